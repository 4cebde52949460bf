"""The custom backward pass of short attention, compared with torch."""

import pytest
import torch
from torch import Tensor

from farthing.base.sizes import SHORT_LENGTH
from farthing.model.kernels.attention import fused, plain, short


def tensors(length: int, heads: int, groups: int, width: int, value: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length)
    shapes = [(2, heads, length, width), (2, groups, length, width), (2, groups, length, value)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


def gradients(attention: object, inputs: list[Tensor], mask: Tensor | None) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in inputs]
    out = attention(*leaves, mask, mask is None)  # type: ignore[operator]
    out.backward(torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype))
    return [out.detach(), *(t.grad for t in leaves)]  # type: ignore[misc]


@pytest.mark.parametrize(("heads", "groups", "value"), [(4, 4, 8), (6, 2, 8), (4, 4, 5)])
@pytest.mark.parametrize("masked", ["causal", "added", "boolean"])
def test_gradients_equal_torch(heads: int, groups: int, value: int, masked: str) -> None:
    inputs = tensors(19, heads, groups, 8, value)
    seen = torch.ones(19, 19, dtype=torch.bool).tril()
    seen[12:, 4:12] = False  # two samples of one prompt
    mask = {
        "causal": None,
        "added": torch.zeros(19, 19).masked_fill_(~seen, -torch.inf),
        "boolean": seen,
    }[masked]
    theirs = gradients(fused, inputs, mask)
    for function in (short, plain):
        for got, expected in zip(gradients(function, inputs, mask), theirs, strict=True):
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_in_bfloat16_it_is_as_accurate_as_torch() -> None:
    inputs = tensors(64, 4, 4, 16, 16)
    truth = gradients(fused, inputs, None)
    halves = [t.bfloat16() for t in inputs]

    def errors(attention: object) -> list[float]:
        results = gradients(attention, halves, None)
        return [
            float((got.float() - want).norm() / want.norm()) for got, want in zip(results, truth, strict=True)
        ]

    for ours, theirs in zip(errors(short), errors(fused), strict=True):
        assert ours < max(2.5 * theirs, 0.01)
    assert SHORT_LENGTH >= 256
