"""Sliding windows: whatever the layout of a batch, key j is seen by query i of one sequence iff 0 <= i - j < window."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from farthing.engine.cache import Decode, PagedCache, Prefill
from farthing.model import ModelConfig, Segments
from farthing.model.attention import mean_pairs
from farthing.model.kernels import segments as layouts
from farthing.model.kernels import window as kernel
from farthing.model.kernels.attention import Rule, plain
from farthing.model.kernels.probe import numbers
from farthing.model.kernels.window import causal

SEGMENT = st.tuples(st.integers(0, 9), st.lists(st.integers(1, 9), max_size=3)).filter(
    lambda segment: segment[0] + sum(segment[1]) > 0
)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "LEAST", 1)


def inputs(queries: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    return numbers(queries, 4, 8), numbers(keys, 2, 8, seed=1), numbers(keys, 2, 8, seed=2)


def expected(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    return plain(*(t.transpose(0, 1)[None] for t in (q, k, v)), seen)[0].transpose(0, 1)


def cells(parts: list[tuple[int, list[int]]], window: int | None) -> Tensor:
    """Who sees whom in concatenated segments, token by token."""
    tokens = []  # (segment, branch, position); the prefix is branch 0
    for number, (prefix, suffixes) in enumerate(parts):
        tokens += [(number, 0, at) for at in range(prefix)]
        for branch, length in enumerate(suffixes, 1):
            tokens += [(number, branch, prefix + at) for at in range(length)]
    return torch.tensor(
        [
            [
                one == other and past in (0, branch) and 0 <= i - j < (window or 10**9)
                for other, past, j in tokens
            ]
            for one, branch, i in tokens
        ]
    )


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(SEGMENT, min_size=1, max_size=4),
    st.one_of(st.none(), st.integers(1, 12)),
    st.sampled_from([0, 1024]),
)
def test_packed_documents_and_shared_prompts(
    parts: list[tuple[int, list[int]]], window: int | None, dense: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layouts, "DENSE_LENGTH", dense)
        batch, seen = Segments(parts), cells(parts, window)
        q, k, v = inputs(batch.tokens, batch.tokens)
        torch.testing.assert_close(
            batch(0, q, k, v, Rule(window)), expected(q, k, v, seen), atol=1e-5, rtol=0
        )
        assert batch.pairs({window: 3}) == int(seen.sum())


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize(("length", "window"), [(17, 5), (16, 4), (6, 6), (6, 7), (9, 1)])
def test_rows_of_one_length(
    length: int, window: int, reference: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if reference:
        monkeypatch.setenv("FARTHING_KERNELS", "reference")
    parts: list[tuple[int, list[int]]] = [(length, [])] * 3
    q, k, v = inputs(3 * length, 3 * length)
    got = Segments(parts)(0, q, k, v, Rule(window))
    torch.testing.assert_close(got, expected(q, k, v, cells(parts, window)), atol=1e-5, rtol=0)


def test_queries_after_cached_keys() -> None:
    q, k, v = inputs(5, 23)
    got = causal(*(t.transpose(0, 1)[None] for t in (q, k, v)), Rule(7))[0].transpose(0, 1)
    torch.testing.assert_close(got, expected(q, k, v, cells([(23, [])], 7)[-5:]), atol=1e-5, rtol=0)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(1, 20), min_size=1, max_size=4), st.integers(1, 3), st.integers(1, 14))
def test_the_paged_cache(lengths: list[int], new: int, window: int) -> None:
    """Prompts in two parts, then several tokens at once, in pages that lie anywhere."""
    config = ModelConfig(10, 32, 8, 2, 4, 2, 8, window=window, sliding=(1,))
    size, each = 4, 6
    cache = PagedCache(config, len(lengths) * each, size, torch.float32, torch.device("cpu"))
    order = torch.randperm(len(lengths) * each, generator=torch.Generator().manual_seed(3)).tolist()
    tables = [order[row * each : (row + 1) * each] for row in range(len(lengths))]
    whole = [inputs(length + new, length + new) for length in lengths]

    def run(attend: Prefill | Decode, spans: list[tuple[int, int]]) -> dict[int, list[Tensor]]:
        q, k, v = (
            torch.cat([row[part][start:end] for row, (start, end) in zip(whole, spans, strict=True)])
            for part in range(3)
        )
        counts = [end - start for start, end in spans]
        return {
            layer: list(attend(layer, q, k, v, Rule(config.window_of(layer))).split(counts))
            for layer in (0, 1)
        }

    steps = [
        [(0, -(-length // 2)) for length in lengths],
        [(-(-length // 2), length) for length in lengths],
        [(length, length + new) for length in lengths],
    ]
    for step, spans in enumerate(steps):
        attend = (
            Decode(cache, tables, [range(*span) for span in spans])
            if step == 2
            else Prefill(cache, tables, spans)
        )
        assert attend.pairs == mean_pairs(spans, {None: 1, window: 1})
        for layer, outs in run(attend, spans).items():
            for (q, k, v), out, (start, end) in zip(whole, outs, spans, strict=True):
                seen = cells([(end, [])], config.window_of(layer))[start:]
                wanted = expected(q[start:end], k[:end], v[:end], seen) if end > start else q[:0]
                torch.testing.assert_close(out, wanted, atol=1e-5, rtol=0)
