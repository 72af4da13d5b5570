"""Threads that each differentiate a share of a minibatch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from typing import TypeVar

import torch
from torch import nn

MIN_SAMPLES = 512
"""Samples below which a share is not worth a thread: its operations are too short."""

Share = TypeVar("Share")
Answer = TypeVar("Answer")


class Team:
    """Threads of one process that work side by side, the caller's among them.

    Each computes whole operations with one thread, and waits for the others once per minibatch.
    Threads within operations wait for each other after every one of them instead, which leaves
    short operations no faster, and stalls where another process takes one of the cores.

    Args:
        size: threads.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._pool = ThreadPoolExecutor(size, initializer=torch.set_num_threads, initargs=(1,))

    def shares(self, columns: int, steps: int) -> list[slice]:
        """Columns of a minibatch, dealt to as many threads as are worth it."""
        count = max(1, min(self.size, columns * steps // MIN_SAMPLES))
        bounds = [columns * i // count for i in range(count + 1)]
        return [slice(start, stop) for start, stop in pairwise(bounds)]

    def map(self, function: Callable[[Share], Answer], shares: list[Share]) -> list[Answer]:
        """Answers in the order of the shares, whatever the order in which they were ready."""
        others = [self._pool.submit(function, share) for share in shares[1:]]
        first = function(shares[0])
        return [first, *(other.result() for other in others)]


@contextmanager
def one_thread() -> Iterator[None]:
    """Operations take one thread within."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def divisible(module: nn.Module) -> bool:
    """Whether a network treats every column by itself; batch statistics and dropout's one stream
    of random numbers do not."""
    return not module.training or not any(
        isinstance(m, nn.modules.batchnorm._BatchNorm) or (isinstance(m, nn.Dropout) and m.p > 0)
        for m in module.modules()
    )
