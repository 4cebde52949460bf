"""A decoder of a few thousand random parameters."""

from collections.abc import Callable

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
