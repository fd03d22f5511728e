"""How the benchmarks take times."""

import statistics
import time

import pytest


@pytest.fixture
def median():
    """Median CPU seconds of a call, after one to warm up."""

    def seconds(function, repeats):
        function()
        times = []
        for _ in range(repeats):
            start = time.process_time()
            function()
            times.append(time.process_time() - start)
        return statistics.median(times)

    return seconds
