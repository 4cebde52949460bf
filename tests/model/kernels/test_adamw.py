"""The compiled optimizer against torch's, over chunks, tails and everything it publishes."""

import copy

import pytest
import torch
from torch import nn

from farthing.model.kernels import adamw
from farthing.model.kernels.native.sizes import CHUNK
from farthing.model.kernels.probe import numbers

SETTINGS = {"lr": 0.03, "betas": (0.8, 0.95), "eps": 1e-6}


@pytest.fixture(autouse=True)
def _needs_kernels():
    status = adamw.COMPILED.status(torch.device("cpu"), torch.float32)
    if not status.on:
        pytest.skip(status.why)


def groups(parameters):
    return [
        {"params": parameters[:1], "weight_decay": 0.1},
        {"params": parameters[1:], "weight_decay": 0.0},
    ]


def give(parameters, step, skipped=()):
    for number, parameter in enumerate(parameters):
        parameter.grad = (
            None if (step, number) in skipped else numbers(*parameter.shape, seed=9 * step + number)
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rounded", [False, True])
def test_many_steps_equal_torchs(dtype, rounded):
    """One parameter has no gradient in one step, and so is a step behind from then on."""
    shapes = [(CHUNK + 5,), (3, CHUNK), (1,), (16, 7)]
    ours, theirs = (
        [nn.Parameter(numbers(*shape, seed=n)) for n, shape in enumerate(shapes)] for _ in range(2)
    )
    published = {p: (torch.zeros(p.shape, dtype=dtype), rounded) for p in ours}
    compiled = adamw.CompiledAdamW(groups(ours), published, **SETTINGS)
    plain = torch.optim.AdamW(groups(theirs), **SETTINGS)
    for step in range(5):
        give(ours, step, {(2, 1)})
        give(theirs, step, {(2, 1)})
        before = [out._version for out, _ in published.values()]
        compiled.clip = factor = 0.25 if step == 3 else 1.0
        for parameter in theirs:
            if parameter.grad is not None:
                parameter.grad *= factor
        compiled.step()
        plain.step()
        for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            torch.testing.assert_close(a.detach(), b.detach(), atol=1e-6, rtol=1e-6)
            out, _ = published[a]
            if (step, number) != (2, 1):
                exact = a.detach().bfloat16() if rounded or dtype == torch.bfloat16 else a.detach()
                assert torch.equal(out, exact.to(dtype))
                assert out._version > before[number]
    for a, b in zip(ours, theirs, strict=True):
        assert compiled.state[a].keys() == plain.state[b].keys()
        assert float(compiled.state[a]["step"]) == float(plain.state[b]["step"])


def test_each_continues_the_others_run():
    parameters = [nn.Parameter(numbers(40, 9)), nn.Parameter(numbers(9))]
    published = {p: (torch.zeros_like(p), False) for p in parameters}
    plain = torch.optim.AdamW(groups(parameters), **SETTINGS)
    give(parameters, 0)
    plain.step()
    compiled = adamw.CompiledAdamW(groups(parameters), published, **SETTINGS)
    compiled.load_state_dict(copy.deepcopy(plain.state_dict()))
    twins = [nn.Parameter(p.detach().clone()) for p in parameters]
    other = torch.optim.AdamW(groups(twins), **SETTINGS)
    other.load_state_dict(copy.deepcopy(compiled.state_dict()))
    for step in (1, 2):
        give(parameters, step)
        give(twins, step)
        compiled.step()
        other.step()
    for a, b in zip(parameters, twins, strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("sizes", [[1], [CHUNK, 3], [5 * CHUNK + 17, 1, 40]])
def test_the_norm_of_many_tensors(sizes):
    tensors = [numbers(size, seed=n) for n, size in enumerate(sizes)]
    exact = float(torch.cat(tensors).double().norm())
    assert adamw.Norm()(tensors) == pytest.approx(exact, rel=1e-6)
    assert adamw.Norm()([]) == 0.0
