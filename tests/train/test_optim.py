"""The optimizers against torch's own, on float32 copies of the same network."""

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from farthing.model import Decoder, ModelConfig, Moe, kernels
from farthing.model.layers import Linear
from farthing.train import checkpoint
from farthing.train.optim import MasterWeights, Muon, add_lora, learning_rate

Make = Callable[..., Decoder]
RATES = (1e-2, 5e-3, 2e-2, 1e-3)


def backward(decoder: nn.Module, step: int, scale: float = 1.0) -> None:
    """A loss whose gradient is the same for the same weights and step."""
    ids = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(step))
    logits = decoder(ids)
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    (loss * scale).backward()


def assert_same(network: nn.Module, expected: dict[str, Tensor], atol: float, rtol: float) -> None:
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name].detach(), atol=atol, rtol=rtol)


@pytest.mark.parametrize("tied", [True, False])
def test_adamw_equals_torch(small_decoder: Make, tied: bool) -> None:
    ours = small_decoder(tied=tied)
    theirs = copy.deepcopy(ours)
    weights = MasterWeights(ours, "adamw", RATES[0], (0.8, 0.95), 0.1)
    parameters = list(theirs.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, lr=RATES[0], betas=(0.8, 0.95), eps=1e-8)
    start = {name: p.detach().clone() for name, p in ours.named_parameters()}
    for step, lr in enumerate(RATES):
        for network in (ours, theirs):
            backward(network, step)
            backward(network, step + 100)  # a second pass of the same batch adds to the first
        norm = nn.utils.clip_grad_norm_(parameters, 0.5)
        assert weights.clip(0.5) == pytest.approx(float(norm), rel=1e-5)
        for group in reference.param_groups:
            group["lr"] = lr
        reference.step()
        reference.zero_grad()
        weights.step(lr)
        assert all(p.grad is None for p in ours.parameters())
    assert_same(ours, dict(theirs.named_parameters()), atol=2e-6, rtol=1e-5)
    assert all(not torch.equal(p, start[name]) for name, p in ours.named_parameters())


def test_steps_too_small_for_bfloat16_still_add_up() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(16, 4, bias=False, dtype=torch.bfloat16)
    wide = nn.Parameter(layer.weight.detach().float())
    before = layer.weight.detach().clone()
    weights = MasterWeights(layer, "adamw", 1e-5, (0.9, 0.95), 0.0)
    reference = torch.optim.AdamW([wide], lr=1e-5, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    moved = []
    for step in range(60):
        slope = torch.randn(4, 16, generator=torch.Generator().manual_seed(step)).abs().bfloat16()
        (layer.weight * slope).sum().backward()
        wide.grad = slope.float()
        weights.step(1e-5)
        reference.step()
        moved.append(not torch.equal(layer.weight, before))
    torch.testing.assert_close(weights.masters[0].copy, wide, atol=1e-7, rtol=1e-6)
    assert torch.equal(layer.weight, weights.masters[0].copy.bfloat16())
    assert moved[-1]
    stuck = (before.float() - 1e-5).bfloat16() == before  # a single step is lost on most of them
    assert float(stuck.float().mean()) > 0.5
    assert float((layer.weight != before).float().mean()) > 0.5


def split(network: Decoder) -> dict[str, tuple[list[nn.Parameter], tuple[int, ...]]]:
    """Every parameter as the separate float32 matrices that are fused in it."""
    parts = {id(m.weight): m.parts for m in network.layers.modules() if isinstance(m, Linear)}
    rows: dict[str, tuple[int, ...]] = {n: parts.get(id(p), (len(p),)) for n, p in network.named_parameters()}
    return {
        name: ([nn.Parameter(piece.clone()) for piece in p.detach().split(rows[name])], rows[name])
        for name, p in network.named_parameters()
    }


class PlainMuon:
    """Muon with Moonlight's scale as the papers write it, one matrix after another, in float64."""

    def __init__(self, parameters: list[nn.Parameter], lr: float, decay: float) -> None:
        self.parameters, self.lr, self.decay = parameters, lr, decay
        self.average = [torch.zeros_like(p, dtype=torch.float64) for p in parameters]

    @torch.no_grad()
    def step(self) -> None:
        for parameter, average in zip(self.parameters, self.average, strict=True):
            assert parameter.grad is not None
            grad = parameter.grad.double()
            average.mul_(0.95).add_(0.05 * grad)
            x = 0.05 * grad + 0.95 * average
            x = x / x.norm()
            for _ in range(5):
                a = x @ x.T
                x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
            scale = 0.2 * max(parameter.shape) ** 0.5
            new = parameter.double() * (1 - self.lr * self.decay) - self.lr * scale * x
            parameter.copy_(new)


def test_muon_takes_fused_matrices_apart(small_decoder: Make) -> None:
    ours = small_decoder()
    whole = copy.deepcopy(ours)
    separate = split(ours)
    assert len(separate["layers.0.attention.qkv.weight"][0]) == 3
    assert len(separate["layers.1.feedforward.gate_up.weight"][0]) == 2
    weights = MasterWeights(ours, "muon", 1e-2, (0.9, 0.95), 0.1)
    inner = [
        p
        for name, (pieces, _) in separate.items()
        for p in pieces
        if p.dim() == 2 and name.startswith("layers.")
    ]
    others = [p for pieces, _ in separate.values() for p in pieces if all(p is not q for q in inner)]
    muon = PlainMuon(inner, lr=1e-2, decay=0.1)
    groups = [
        {"params": [p for p in others if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in others if p.dim() == 1], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    fused = PlainMuon(
        [p for n, p in whole.named_parameters() if n.startswith("layers.") and p.dim() == 2],
        lr=1e-2,
        decay=0.1,
    )
    shadow = copy.deepcopy(ours)
    for step in range(3):
        with torch.no_grad():
            for name, parameter in shadow.named_parameters():
                parameter.copy_(torch.cat([piece.detach() for piece in separate[name][0]]))
        shadow.zero_grad()
        backward(shadow, step)
        for name, parameter in shadow.named_parameters():
            pieces, rows = separate[name]
            assert parameter.grad is not None
            for piece, grad in zip(pieces, parameter.grad.split(rows), strict=True):
                piece.grad = grad.clone()
        muon.step()
        adamw.step()
        backward(ours, step)
        weights.step(1e-2)
        if step == 0:
            whole.zero_grad()
            backward(whole, step)
            fused.step()
            qkv = whole.get_parameter("layers.0.attention.qkv.weight")
            apart = ours.get_parameter("layers.0.attention.qkv.weight")
            assert float((qkv - apart).detach().abs().max()) > 2e-3  # so this test tells fused from apart
    expected = {name: torch.cat(list(pieces)) for name, (pieces, _) in separate.items()}
    assert_same(ours, expected, atol=2e-5, rtol=0)  # one step moves by about 1e-2


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_restored_optimizer_goes_on_to_the_bit(
    small_decoder: Make, tmp_path: Path, kind: str, lora: bool, dtype: torch.dtype
) -> None:
    def start(seed: int) -> tuple[Decoder, MasterWeights]:
        decoder = small_decoder(seed, dtype=dtype)
        if lora:
            add_lora(decoder, 2, 4.0, seed)
        return decoder, MasterWeights(decoder, kind, 1e-2, (0.9, 0.95), 0.1)

    first, weights = start(1)
    for step in range(3):
        backward(first, step)
        weights.step(1e-2)
    checkpoint.save(tmp_path, 3, weights.state(), {})
    again, restored = start(1 if lora else 2)  # with LoRA the frozen weights are the base's, not the state's
    found = checkpoint.latest(tmp_path)
    assert found is not None
    restored.restore(found[1])
    for step in range(3, 6):
        for decoder, optimizer in ((first, weights), (again, restored)):
            backward(decoder, step)
            optimizer.step(5e-3)
    mine, theirs = weights.state(), restored.state()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    for one, two in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two)


def test_a_device_without_the_fused_step_takes_the_plain_one(
    small_decoder: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, ours = small_decoder(), small_decoder()
    fused = MasterWeights(expected, "adamw", 1e-2, (0.9, 0.95), 0.1)
    real = torch.optim.AdamW

    def refuses(*args: Any, fused: bool = False, **more: Any) -> torch.optim.Optimizer:
        if fused:
            raise RuntimeError("`fused=True` requires all the params to be of supported devices")
        return real(*args, **more)

    with monkeypatch.context() as patched:
        patched.setattr(torch.optim, "AdamW", refuses)
        kernels.forget()
        plain = MasterWeights(ours, "adamw", 1e-2, (0.9, 0.95), 0.1)
    kernels.forget()
    for weights, decoder in ((fused, expected), (plain, ours)):
        backward(decoder, 0)
        weights.step(1e-2)
    assert_same(ours, dict(expected.named_parameters()), atol=1e-6, rtol=0)


def test_learning_rates() -> None:
    def rates(schedule: str, warmup: int = 0) -> list[float]:
        return [learning_rate(step, 10, 2.0, warmup, schedule) for step in range(10)]

    assert rates("constant") == [2.0] * 10
    assert rates("constant", warmup=4)[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert rates("linear", warmup=5)[4:] == pytest.approx([2.0, 2.0, 1.6, 1.2, 0.8, 0.4])
    cosine = rates("cosine")
    assert cosine[0] == 2.0
    assert cosine[2] == pytest.approx(1.8090169943749475)  # 1 + cos(pi / 5)
    assert cosine[5] == pytest.approx(1.0)
    assert all(a > b > 0 for a, b in itertools.pairwise(cosine))
    assert learning_rate(10, 10, 2.0, 0, "cosine") == pytest.approx(0)
    assert rates("wsd", warmup=2) == pytest.approx([1.0, *[2.0] * 8, 1.0])
    late = [learning_rate(step, 50, 1.0, 0, "wsd") for step in (0, 39, 40, 41, 49, 50)]
    assert late == pytest.approx([1, 1, 1, 0.9, 0.1, 0])
    assert rates("cosine", warmup=10) == pytest.approx([0.2 * step for step in range(1, 11)])


@pytest.mark.parametrize(("rows", "columns"), [(5, 7), (9, 7)])  # wide and tall
def test_muon_of_a_stack_is_torchs_muon_of_each_matrix(rows: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(0)
    stack = nn.Parameter(torch.randn(3, 2 * rows, columns, generator=generator))
    apart = [nn.Parameter(half.detach().clone()) for matrix in stack for half in matrix.split(rows)]
    groups = [{"params": [stack], "rows": rows}]
    ours = Muon(groups, lr=1e-2, weight_decay=0.1, products=torch.bfloat16)
    theirs = torch.optim.Muon(apart, lr=1e-2, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        grad = torch.randn(stack.shape, generator=generator)
        stack.grad = grad
        for parameter, part in zip(apart, grad.view(-1, rows, columns), strict=True):
            parameter.grad = part.clone()
        ours.step()
        theirs.step()
    # torch's products are single ones in bfloat16, ours batched: they round differently
    torch.testing.assert_close(stack.view(-1, rows, columns), torch.stack(apart), atol=4e-3, rtol=0)


def test_muon_takes_expert_stacks_and_leaves_routers_to_adamw() -> None:
    decoder = Decoder(
        ModelConfig(
            vocab_size=31,
            hidden_size=16,
            intermediate_size=24,
            num_layers=2,
            num_heads=2,
            num_kv_heads=1,
            head_dim=8,
            moe=Moe(experts=4, top_k=2, expert_size=8),
        )
    )
    decoder.init_weights(0)
    weights = MasterWeights(decoder, "muon", 1e-2, (0.9, 0.95), 0.0)
    stacks = [o for o in weights.optimizers if isinstance(o, Muon)][1:]  # the first has the single matrices
    assert [tuple(g["params"][0].shape) for g in stacks[0].param_groups] == [(4, 16, 16), (4, 16, 8)] * 2
    assert [g["rows"] for g in stacks[0].param_groups] == [8, 16] * 2
    adamw = weights.optimizers[0]
    assert isinstance(adamw, torch.optim.AdamW)
    shapes = [tuple(p.shape) for group in adamw.param_groups for p in group["params"]]
    assert shapes.count((4, 16)) == 2  # the routers' matrices
    before = {name: p.detach().clone() for name, p in decoder.named_parameters()}
    decoder(torch.arange(12)[None]).square().mean().backward()
    weights.clip(1.0)
    weights.step(1e-2)
    moved = {name for name, p in decoder.named_parameters() if not torch.equal(p.detach(), before[name])}
    assert {name for name in before if not name.endswith("router.bias")} - moved == set()
    restored = weights.state()
    weights.restore(restored)
