"""The memory that log-probabilities keep between steps."""

import pytest
import torch

from farthing.model.kernels import logprobs as module
from farthing.model.kernels.logprobs import logprobs


def problem(tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    hidden, head = (torch.randn(n, 8, generator=draw).requires_grad_() for n in (tokens, 37))
    return hidden, head, torch.randint(37, (tokens,), generator=draw)


def expected(hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> list[torch.Tensor]:
    loss = -torch.nn.functional.cross_entropy(hidden @ head.T, targets, reduction="sum")
    return list(torch.autograd.grad(loss, (hidden, head)))


def check(got: tuple[torch.Tensor, ...], want: list[torch.Tensor]) -> None:
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


@pytest.fixture(autouse=True)
def nothing_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_free", [])


def test_losses_that_wait_for_their_backward_pass_do_not_share_memory() -> None:
    problems = [problem(9, 1), problem(9, 2)]
    waiting = [logprobs(*each).sum() for each in problems]
    for loss, each in zip(waiting, problems, strict=True):
        check(torch.autograd.grad(loss, each[:2]), expected(*each))
    assert len(module._free) == 2


def test_a_second_backward_pass_is_right_although_its_memory_is_gone() -> None:
    first, second = problem(9, 1), problem(9, 2)
    loss = logprobs(*first).sum()
    check(torch.autograd.grad(loss, first[:2], retain_graph=True), expected(*first))
    torch.autograd.grad(logprobs(*second).sum(), second[:2])
    check(torch.autograd.grad(loss, first[:2]), expected(*first))


def test_memory_is_used_again_and_grows_with_the_rows() -> None:
    sizes = []
    for tokens in (9, 5, 30, 30):
        each = problem(tokens, tokens)
        check(torch.autograd.grad(logprobs(*each).sum(), each[:2]), expected(*each))
        sizes.append([memory.numel() for memory in module._free])
    assert sizes == [[9 * 37], [9 * 37], [30 * 37], [30 * 37]]


def test_without_gradients_nothing_is_kept() -> None:
    hidden, head, targets = problem(9, 1)
    with torch.no_grad():
        logprobs(hidden, head, targets)
    assert not module._free


def test_a_frozen_head_or_frozen_states_get_no_gradient() -> None:
    hidden, head, targets = problem(9, 1)
    want = expected(hidden, head, targets)
    for kept_bytes in (1 << 20, 100):
        (grad,) = torch.autograd.grad(
            logprobs(hidden, head.detach(), targets, kept_bytes=kept_bytes).sum(), hidden
        )
        check((grad,), want[:1])
        (grad,) = torch.autograd.grad(
            logprobs(hidden.detach(), head, targets, kept_bytes=kept_bytes).sum(), head
        )
        check((grad,), want[1:])
