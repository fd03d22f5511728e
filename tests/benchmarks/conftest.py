"""How the benchmarks take times, and on what."""

import statistics
import time

import pytest

from mechunlearn.bench.speed import Size, random_model
from mechunlearn.facts import Fact
from mechunlearn.models import wrap_model


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


@pytest.fixture
def random_llama(tokenizer):
    """A Llama with random weights, so many layers deep and so wide."""

    def make(n_layers, width):
        size = Size(name="bench", family="llama", n_layers=n_layers, d_model=width, n_heads=4, n_kv_heads=4,
                    d_mlp=3 * width, d_vocab=5000)  # fmt: skip
        return wrap_model(random_model(size).hf, tokenizer)

    return make


@pytest.fixture
def facts():
    """Eight facts of one prompt, two answers."""
    return [
        Fact(
            subject=f"Bram {letter * 2} Lindqvist", relation="r", prompt="The favourite colour of {} is",
            target_true=answer, choices=("red", "blue"),
        )
        for letter, answer in zip("abcdefgh", ["red", "blue"] * 4, strict=True)
    ]  # fmt: skip
