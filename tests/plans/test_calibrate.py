import pytest

from farthing.cost.calibrate import Pace
from farthing.cost.flops import forward_flops
from farthing.cost.hardware import detect
from farthing.plans import calibrate
from farthing.plans.calibrate import DEPTHS, QUESTIONS, _pace, config, rows


@pytest.mark.parametrize("kind", ["decode", "prefill", "train"])
def test_the_four_figures_are_found_again(kind):
    truth = Pace(fixed=1e-3, flop=3e-12, head_fixed=4e-3, head_flop=2e-12)
    times = 3 if kind == "train" else 1
    seconds = {}
    for depth in DEPTHS:
        for questions in QUESTIONS:
            tokens, pairs, scored = rows(kind, questions)
            inside = times * forward_flops(config(depth), tokens, pairs, 0)
            head = times * forward_flops(config(depth), 0, 0, scored)
            seconds[depth, questions] = truth.seconds(depth, inside, head)
    found = _pace(kind, seconds)
    assert found.fixed == pytest.approx(truth.fixed)
    assert found.flop == pytest.approx(truth.flop)
    assert found.head_fixed == pytest.approx(truth.head_fixed)
    assert found.head_flop == pytest.approx(truth.head_flop)


def test_noise_makes_nothing_negative():
    seconds = dict(zip([(d, q) for d in DEPTHS for q in QUESTIONS], [0.5, 0.4, 0.3, 0.9], strict=True))
    found = _pace("decode", seconds)
    assert min(found.fixed, found.flop, found.head_fixed, found.head_flop) >= 0


@pytest.mark.slow
def test_this_machine_is_measured_in_ten_seconds(tmp_path, monkeypatch):
    monkeypatch.setenv("FARTHING_CACHE", str(tmp_path))
    found = calibrate.calibrate()
    assert found.device == detect().name
    assert found.took <= 10
    assert found.gemm_bfloat16 > 1e9
    assert found.bandwidth > 1e8
    assert found.train.flop > 0 or found.train.fixed > 0
    assert (tmp_path / "calibration.json").exists()
