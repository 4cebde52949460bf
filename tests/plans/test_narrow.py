import pytest
from hypothesis import given
from hypothesis import strategies as st

from farthing.base.device import Place
from farthing.plans.narrow import KINDS, NARROW, TOKENS, WIDE, flops, pace, passes, solve


def truth(narrow, route, head=0.01):
    """Seconds of each kind, if a FLOP takes `narrow`, a routed token `route`, and what is not in the layers `head`."""
    return {
        kind: head + narrow * flops(kind) + route * TOKENS * (layers - dense)
        for kind, (layers, dense) in KINDS.items()
    }


@given(narrow=st.floats(1e-13, 1e-9), route=st.floats(0, 1e-4))
def test_both_are_found_again(narrow, route):
    found = solve(truth(narrow, route))
    assert found == pytest.approx((narrow, route), rel=1e-6, abs=1e-12)


def test_noise_makes_nothing_negative():
    assert solve({"one dense": 3.0, "two dense": 2.0, "dense and sparse": 1.0}) == (0.0, 0.0)
    assert solve({"one dense": 1.0, "two dense": 2.0, "dense and sparse": 1.5})[1] == 0.0


def test_a_flop_takes_what_was_measured_at_both_widths_and_between_in_between():
    assert pace(4e-12, 7e-12, WIDE) == pace(4e-12, 7e-12, 4 * WIDE) == 4e-12
    assert pace(4e-12, 7e-12, NARROW) == pytest.approx(7e-12)
    between = [pace(4e-12, 7e-12, width) for width in (128, 192, 256, 384, 576)]
    assert between == sorted(between, reverse=True)
    assert pace(4e-12, 7e-12, NARROW // 2) == pytest.approx(
        14e-12
    )  # seconds go with the width, FLOPs with its square
    assert pace(4e-12, 0.0, NARROW) == 4e-12  # not measured


def test_every_kind_is_timed():
    for work, do in passes(Place("cpu", "float32", "asked for")).values():
        assert work > 0
        assert do() > 0
