"""A prompt and its samples: as one batch behind the prompt, whatever their lengths, and what that keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from farthing.model.kernels import segments as module
from farthing.model.kernels.attention import Rule
from farthing.model.kernels.probe import cast, distance, numbers, result_and_gradients
from farthing.model.kernels.segments import Plan, one_by_one

EVEN, UNEVEN, STRAY = [20, 20, 20], [20, 1, 13, 17], [90, 1, 1, 1]


def inputs(prefix: int, suffixes: list[int]) -> tuple[Tensor, ...]:
    tokens = prefix + sum(suffixes)
    shapes = ((tokens, 6, 16), (tokens, 2, 16), (tokens, 2, 12))
    return tuple(numbers(*shape, seed=seed).requires_grad_() for seed, shape in enumerate(shapes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "rule", [Rule(), Rule(window=9), Rule(softcap=2.0)], ids=["full", "window", "softcap"]
)
@pytest.mark.parametrize("suffixes", [EVEN, UNEVEN, STRAY, [7]], ids=str)
@pytest.mark.parametrize("prefix", [1, 33, 140])
def test_samples_behind_a_prompt(prefix: int, suffixes: list[int], rule: Rule, dtype: torch.dtype) -> None:
    segments = [(prefix, suffixes)]

    def fast(*qkv: Tensor) -> Tensor:
        return Plan(segments).together(*qkv, rule)

    def definition(*qkv: Tensor) -> Tensor:
        return one_by_one(*qkv, segments, rule)

    device, given = torch.device("cpu"), inputs(prefix, suffixes)
    got = result_and_gradients(fast, cast(given, device, dtype))
    wanted = result_and_gradients(definition, given)
    for one, exact in zip(got, wanted, strict=True):
        assert distance(one, exact) < (1e-5 if dtype == torch.float32 else 0.01)


@pytest.mark.parametrize("suffixes", [EVEN, UNEVEN], ids=str)
def test_nothing_of_the_batch_is_kept_for_the_backward_pass(
    suffixes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind a long prompt the copies are many times what they are copied from."""
    kept: list[int] = []
    hooks = torch.autograd.graph.saved_tensors_hooks

    def counted(pack: Any, unpack: Any) -> Any:
        def counting(tensor: Tensor) -> Any:
            packed = pack(tensor)
            kept.append(packed.numel() if isinstance(packed, Tensor) else 0)
            return packed

        return hooks(counting, unpack)

    monkeypatch.setattr(module.torch.autograd.graph, "saved_tensors_hooks", counted)
    qkv = cast(inputs(140, suffixes), torch.device("cpu"), torch.bfloat16)
    Plan([(140, suffixes)]).together(*qkv).sum().backward()
    assert len(kept) >= 3
    assert sum(kept) == 0
