"""Probes detect what a processor or torch lacks, and the network runs without it."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from farthing.base.errors import UserError
from farthing.model import Decoder, Segments, kernels
from farthing.model.kernels import packed, rows
from farthing.model.kernels.probe import Kernel, distance, numbers
from farthing.model.layers import Linear
from farthing.train.losses import next_token_losses

Remove = Callable[[pytest.MonkeyPatch], Any]
BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def broken(*_: Any, **__: Any) -> Any:
    raise RuntimeError("could not create a primitive descriptor\nand a second line")


attention = F.scaled_dot_product_attention


def doubled(*args: Any, **settings: Any) -> torch.Tensor:
    return 2 * attention(*args, **settings)


REMOVED: dict[str, Remove] = {
    "nothing": lambda patch: None,
    "oneDNN": lambda patch: patch.setattr(torch.backends.mkldnn, "is_available", lambda: False),
    "its products": lambda patch: patch.setattr(torch.ops.mkldnn, "_linear_pointwise", broken),
    "its packing": lambda patch: patch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", broken),
    "fused attention": lambda patch: patch.setattr(F, "scaled_dot_product_attention", broken),
    "correct attention": lambda patch: patch.setattr(F, "scaled_dot_product_attention", doubled),
    "softmax's gradient": lambda patch: patch.delattr(torch, "_softmax_backward_data"),
    "sums of rows": lambda patch: patch.setattr(F, "embedding_bag", broken),
    "LayerNorm": lambda patch: patch.setattr(F, "layer_norm", broken),
    "ragged products": lambda patch: patch.delattr(F, "grouped_mm", raising=False),
    "the fused loss": lambda patch: patch.delattr(F, "linear_cross_entropy", raising=False),
    "all fast paths": lambda patch: patch.setenv("FARTHING_KERNELS", "reference"),
}


def results(decoder: Decoder) -> list[torch.Tensor]:
    """Return the logits, then the loss and its gradients."""
    ids = torch.arange(60).view(2, 30) * 3 % 300
    with torch.no_grad():
        logits = decoder(ids)
    attend = Segments([(9, [7, 4]), (40, [])])
    hidden = decoder.hidden(ids.flatten(), attend.positions(), attend)
    loss = next_token_losses(hidden, decoder.head.weight, ids.flatten().roll(-1)).mean()
    named = [p for p in decoder.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, named, allow_unused=True)
    return [logits, loss.detach(), *(grad for grad in grads if grad is not None)]


@BOTH
@pytest.mark.parametrize("removed", REMOVED)
def test_the_network_runs_without(
    removed: str, dtype: torch.dtype, small_deepseek: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every token goes to every expert, so rounding cannot change the routing."""
    decoder, _ = small_deepseek(n_routed_experts=4, num_experts_per_tok=4, n_group=1, topk_group=1)
    with monkeypatch.context() as reference:
        reference.setenv("FARTHING_KERNELS", "reference")
        exact = results(decoder)
    kernels.forget()
    REMOVED[removed](monkeypatch)
    limit = 1e-4 if dtype == torch.float32 else 0.12
    for got, expected in zip(results(decoder.to(dtype)), exact, strict=True):
        assert distance(got, expected) < limit


def status(name: str, dtype: torch.dtype = torch.bfloat16) -> kernels.Status:
    return next(each for each in kernels.status("cpu", dtype) if each.name == name)


@pytest.mark.parametrize(
    ("removed", "name", "why"),
    [
        ("oneDNN", "packed products", "this torch is built without oneDNN"),
        ("fused attention", "attention", "RuntimeError: could not create a primitive descriptor"),
        # off by its whole norm, up to rounding
        ("correct attention", "attention", "its result is off by 1"),
        ("softmax's gradient", "short attention", "this torch has no _softmax_backward_data"),
        ("the fused loss", "cross-entropy", "this torch has no linear_cross_entropy (2.13 does)"),
        ("all fast paths", "joined segments", "FARTHING_KERNELS=reference"),
    ],
)
def test_a_disabled_path_says_why(removed: str, name: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    REMOVED[removed](monkeypatch)
    result = status(name)
    assert not result.on
    assert result.why.startswith(why)


def test_oneDNN_support_is_queried_before_it_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", broken)
    assert status("packed products").why == "oneDNN has no bfloat16 on this processor"
    kernels.forget()
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    assert status("packed products").why.startswith("RuntimeError: could not create")


@pytest.mark.parametrize(
    ("capability", "why"), [((7, 5), "a GPU before compute capability 8.0"), ((8, 0), "")]
)
def test_an_old_gpu_has_no_ragged_products(
    capability: tuple[int, int], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    gpu = torch.device("cuda:0")
    assert rows.RAGGED.lacks(gpu, torch.bfloat16) == why
    assert rows.RAGGED.lacks(gpu, torch.float32) == "for bfloat16 on a GPU"
    monkeypatch.delattr(F, "grouped_mm")
    assert rows.RAGGED.lacks(gpu, torch.bfloat16) == "this torch has no grouped_mm"


def test_all_are_off_under_farthing_kernels_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    assert any(path.on for path in kernels.status("cpu", torch.float32))
    monkeypatch.setenv("FARTHING_KERNELS", "reference")
    assert any(path.on for path in kernels.status("cpu", torch.float32)), "decisions are cached"
    kernels.forget()
    assert not any(path.on for path in kernels.status("cpu", torch.float32))
    kernels.forget()
    monkeypatch.setenv("FARTHING_KERNELS", "fast")
    with pytest.raises(UserError, match="must be auto or reference"):
        kernels.status("cpu", torch.float32)


def squared(x: torch.Tensor) -> torch.Tensor:
    return x * x


def kernel(fast: Callable[..., torch.Tensor]) -> Kernel:
    examples = [(numbers(3, 4).requires_grad_(),)]
    return Kernel("square", "a square", fast, squared, lambda device, dtype: "", lambda: examples)


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad * ctx.saved_tensors[0]


@pytest.mark.parametrize(
    ("fast", "why"),
    [
        (squared, "a square; checked against plain torch"),
        (lambda x: x * x + 0.1, "its result is off by"),
        (lambda x: x * torch.nan, "its result is off by nan"),
        (_WrongGradient.apply, "its result is off by 50.0%"),
        (lambda x: x.no_such_thing(), "AttributeError: 'Tensor' object has no attribute 'no_such_thing'"),
    ],
)
def test_a_kernel_is_used_if_it_agrees(fast: Callable[..., torch.Tensor], why: str) -> None:
    result = kernel(fast).status(torch.device("cpu"), torch.float32)
    assert result.on == (fast is squared)
    assert result.why.startswith(why)


def test_a_probe_is_isolated_from_the_caller() -> None:
    """It may run at any point: without gradients, in inference, while counting FLOPs, during a seeded draw."""
    seen: list[torch.Tensor] = []
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    with (
        torch.inference_mode(),
        FlopCounterMode(display=False) as counter,
        torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t),
    ):
        results = kernels.status("cpu", torch.float32)
        assert torch.is_inference_mode_enabled()
    assert {status.name for status in results if not status.on} <= {
        "packed products", "linear maps", "RMSNorm", "short attention", "ragged products",
    }  # fmt: skip
    assert counter.get_total_flops() == 0
    assert not seen
    assert torch.equal(torch.rand(4), expected)


def test_copies_drop_the_packed_layout_and_new_weights_are_repacked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    packs = []
    monkeypatch.setattr(packed, "usable", lambda weight: not torch.is_grad_enabled())
    monkeypatch.setattr(packed, "pack", lambda weight: packs.append(1) or weight.detach().clone())
    monkeypatch.setattr(packed, "linear", lambda x, w, bias, plus: F.linear(x, w, bias))
    linear, x = Linear(4, (3,)), torch.ones(2, 4)
    with torch.no_grad():
        linear(x)
        linear(x)
        assert len(packs) == 1
        linear.weight.add_(1)
        assert torch.equal(linear(x), F.linear(x, linear.weight))
        assert len(packs) == 2
        for duplicate in (copy.deepcopy(linear), pickle.loads(pickle.dumps(linear))):
            assert not duplicate._layout._parts
            assert torch.equal(duplicate(x), linear(x))
        assert list(linear.state_dict()) == ["weight"]
