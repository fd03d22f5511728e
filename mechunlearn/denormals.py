"""Numbers too small for their type's exponent, which CPUs handle slowly."""

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def denormals_as_zero() -> Iterator[None]:
    """Numbers below 1e-38 count as 0, on this thread: an operation on one takes an x86 core many times as long."""
    was = float(torch.tensor(1e-39) * 1.0) == 0.0  # there is no getter
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(was)
