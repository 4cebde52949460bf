"""A decoder of a few thousand random parameters, and two ranks in one process."""

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from farthing.model import Decoder, ModelConfig


@pytest.fixture(scope="session")
def small_decoder() -> Callable[..., Decoder]:
    """A function that makes a random decoder: grouped queries, q, k, v and gate, up fused."""

    def make(seed: int = 5, tied: bool = True, dtype: torch.dtype = torch.float32) -> Decoder:
        config = ModelConfig(
            vocab_size=61, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2,
            head_dim=8, tied_head=tied,
        )  # fmt: skip
        decoder = Decoder(config)
        decoder.init_weights(seed=seed, std=0.2)
        return decoder.to(dtype)

    return make


class Rank:
    """One of two ranks in one process, threads that wait for each other at every total."""

    count, device = 2, "cpu"

    def __init__(self, index: int, sums: list[Any], barrier: threading.Barrier) -> None:
        self.index, self._sums, self._barrier = index, sums, barrier

    def share(self, items: int) -> slice:
        middle = (items + 1) // 2
        return slice(middle, items) if self.index else slice(0, middle)

    def total(self, amount: Any) -> Any:
        self._sums[self.index] = amount
        self._barrier.wait(60)
        total = self._sums[0] + self._sums[1]
        self._barrier.wait(60)
        return total


@pytest.fixture
def on_two() -> Callable[..., list[Any]]:
    """A function that gives the results of `work(rank, network)` on two ranks, each with a copy of the network."""

    def run(work: Callable[[Rank, Any], Any], network: Any) -> list[Any]:
        sums: list[Any] = [None, None]
        barrier = threading.Barrier(2)
        with ThreadPoolExecutor(2) as pool:
            futures = [
                pool.submit(work, Rank(index, sums, barrier), copy.deepcopy(network)) for index in (0, 1)
            ]
            return [future.result(120) for future in futures]

    return run
