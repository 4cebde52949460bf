"""What the training tests share: a ledger of their own, and a decoder of a few thousand random parameters."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from farthing.cost.devices import Device
from farthing.cost.meter import Meter
from farthing.model import Decoder, ModelConfig
from farthing.recipe import Grpo, validate


@pytest.fixture
def meter(tmp_path: Path) -> Iterator[Meter]:
    device = Device(name="cpu: test", kind="cpu")
    with Meter(tmp_path / "ledger.jsonl", stage="01-grpo", device=device, rate=(0.0, "test")) as meter:
        yield meter


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


@pytest.fixture
def make_stage() -> Callable[..., Grpo]:
    """A function that makes a stage's settings: small sums, and whatever is asked for."""

    def make(**settings: Any) -> Grpo:
        digits = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
        stage = {
            "kind": "grpo", "tasks": {"chain_sum": {"weight": 1, "config": digits}}, "steps": 4, "prompts": 2,
            "group": 4, "max_new_tokens": 6, "lr": 1e-3, "sync_every": 1, "sync_tolerance": 0.1,
            "checkpoint_every": 2,
        }  # fmt: skip
        return validate({"name": "test", "base": "none", "stages": [stage | settings]}).stages[0]

    return make
