"""Every fast path against its reference, in every dtype, on larger inputs than its probe."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from farthing.model.kernels import KERNELS, Kernel
from farthing.model.kernels.attention import Rule
from farthing.model.kernels.probe import cast, distance, numbers, result_and_gradients

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def leaf(*shape: int, seed: int = 0) -> Tensor:
    return numbers(*shape, seed=seed).requires_grad_()


def packed() -> tuple[Any, ...]:
    weights = (numbers(96, 64, seed=1) / 8, numbers(96, 64, seed=2) / 8, numbers(96, seed=3))
    return numbers(33, 64), *weights, numbers(33, 96, seed=4)


def heads() -> tuple[Any, ...]:
    return leaf(2, 6, 130, 32), leaf(2, 2, 130, 32, seed=1), leaf(2, 2, 130, 24, seed=2), None, True


def documents() -> tuple[Any, ...]:
    segments = [(30, [20, 1, 25]), (300, []), (3, []), (70, []), (6, [])]
    inputs = (leaf(455, 4, 16), leaf(455, 2, 16, seed=1), leaf(455, 2, 16, seed=2))
    return *inputs, segments


def window() -> tuple[Any, ...]:
    return leaf(2, 6, 300, 32), leaf(2, 2, 330, 32, seed=1), leaf(2, 2, 330, 24, seed=2), Rule(17)


def uneven(top_k: int) -> tuple[Any, ...]:
    """Loads that fall off steeply, so padding to one length does not pay."""
    likely = torch.linspace(3, -3, 16).exp().expand(400, -1)
    chosen = torch.multinomial(likely, top_k, generator=torch.Generator().manual_seed(5))
    weights = (leaf(16, 64, 32, seed=1), leaf(16, 32, 32, seed=2))
    return leaf(400, 32), leaf(400, top_k, seed=3), chosen, *weights


def ragged() -> tuple[Any, ...]:
    ends = torch.tensor([0, 70, 71, 200], dtype=torch.int32)
    return numbers(200, 64), numbers(200, 32, seed=1), numbers(4, 32, 64, seed=2), ends


def targets() -> tuple[Any, ...]:
    return leaf(50, 32), leaf(301, 32, seed=1), torch.arange(50) * 6


def linear() -> tuple[Any, ...]:
    return leaf(70, 64), leaf(96, 64, seed=1), leaf(96, seed=2), leaf(70, 96, seed=3)


def long() -> tuple[Any, ...]:
    """More rows than a product takes at a time, more of them than are kept."""
    hidden, head = leaf(700, 32), leaf(3001, 32, seed=1)
    return hidden, head, torch.arange(700) * 4, 0.8, 15.0, 200 * 4 * 3001


INPUTS: dict[str, Callable[[], tuple[Any, ...]]] = {
    "packed products": packed,
    "linear maps": linear,
    "RMSNorm": lambda: (leaf(70, 576), leaf(576, seed=1), 1e-5),
    "SwiGLU": lambda: (leaf(70, 320), True),
    "attention": heads,
    "short attention": heads,
    "joined segments": documents,
    "windows": window,
    "experts": lambda: uneven(3),
    "ragged products": ragged,
    "log-probabilities": long,
    "cross-entropy": targets,
    "AdamW": lambda: (numbers(70, 33), numbers(70, 33, seed=1)),
    "clipping, AdamW and publishing": lambda: (numbers(70, 33), numbers(70, 33, seed=1)),
    "decoding": lambda: (numbers(33, 96), numbers(160, 96, seed=1)),
}


def test_every_kernel_is_tested() -> None:
    assert [kernel.name for kernel in KERNELS] == list(INPUTS)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kernel", KERNELS, ids=[kernel.name.replace(" ", "-") for kernel in KERNELS])
def test_a_fast_path_equals_its_reference(kernel: Kernel, dtype: torch.dtype, device: str) -> None:
    place = torch.device(device)
    status = kernel.status(place, dtype)
    if not status.on:
        pytest.skip(status.why)
    inputs = cast(INPUTS[kernel.name](), place, dtype)
    exact = cast(inputs, place, torch.float32)
    expected = result_and_gradients(kernel.reference, exact)
    results = result_and_gradients(kernel.fast, inputs)
    same_dtype = result_and_gradients(kernel.reference, inputs)
    for got, reference, truth in zip(results, same_dtype, expected, strict=True):
        assert got.shape == truth.shape
        allowed = 1e-5 if dtype == torch.float32 else max(2.5 * distance(reference, truth), 0.01)
        assert distance(got, truth) < allowed
