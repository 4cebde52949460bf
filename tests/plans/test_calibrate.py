import pytest

from farthing.base.device import Place
from farthing.base.errors import UserError
from farthing.cost.devices import detect
from farthing.plans import calibrate
from farthing.plans.calibrate import SIZES, TooLate, climb, repeat, solve
from farthing.plans.measured import Pace

RATE = 4e11  # FLOP/s of products


class Clock:
    """Time that only goes on when somebody works, and a deadline."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def left(self) -> float:
        return self.seconds

    def work(self, seconds: float) -> float:
        self.seconds -= seconds
        return seconds


def truth(size, pace, kind):
    return {
        (kind, depth, q): pace.seconds(
            depth, size.flops(kind, depth, q, False), size.flops(kind, depth, q, True)
        )
        for depth, q in size.passes()
    }


# ---- the four figures ----


@pytest.mark.parametrize("size", SIZES, ids=lambda size: str(size.questions))
@pytest.mark.parametrize("kind", ["decode", "prefill", "train"])
def test_the_four_figures_are_found_again(kind, size):
    pace = Pace(fixed=1e-3, flop=7e-12, head_fixed=4e-3, head_flop=5e-12)
    found = solve(kind, size, truth(size, pace, kind), RATE)
    assert found.fixed == pytest.approx(pace.fixed)
    assert found.flop == pytest.approx(pace.flop)
    assert found.head_fixed == pytest.approx(pace.head_fixed)
    assert found.head_flop == pytest.approx(pace.head_flop)


@pytest.mark.parametrize("values", [(0.5, 0.4, 0.3, 0.9), (0.1, 0.1, 0.1, 0.1), (0.1, 9.0, 0.1, 0.1)])
def test_noise_makes_nothing_negative_or_faster_than_a_product(values):
    size = SIZES[0]
    seconds = {("decode", *at): value for at, value in zip(size.passes(), values, strict=True)}
    found = solve("decode", size, seconds, RATE)
    assert min(found.fixed, found.head_fixed) >= 0
    for flop in (found.flop, found.head_flop):
        assert 1.5 / RATE <= flop <= 3.5 / RATE


# ---- the budget ----


@pytest.mark.parametrize("speed", [1e9, 4e9, 1e10, 5e10, 3e11, 1e14])
def test_a_slow_machine_is_asked_less_and_none_for_longer(speed):
    clock = Clock(5.0)

    def measure(size):
        parts = dict.fromkeys(range(12), size.work / 12)  # of one round
        passes = {n: (work, lambda work=work: clock.work(work / speed)) for n, work in parts.items()}
        return repeat(passes, 3, clock.left)

    found = climb(measure, clock.left)
    assert clock.seconds >= -SIZES[0].work / 12 / speed  # late by one pass of the smallest at most
    assert found is not None or speed == 1e9
    if speed == 1e10:
        assert found[0] in SIZES[:2]
    if speed == 1e14:
        assert found[0] is SIZES[-1]


def test_sizes_go_from_little_work_to_much():
    work = [size.work for size in SIZES]
    assert work == sorted(work)
    assert len(set(work)) == len(work)


def test_a_size_that_goes_slower_than_expected_is_given_up():
    clock = Clock(5.0)

    def measure(size):
        if size is not SIZES[0]:
            clock.work(4.0)
            raise TooLate
        clock.work(0.01)
        return "small"

    assert climb(measure, clock.left) == (SIZES[0], "small")


def test_a_machine_on_which_nothing_is_done_in_time_has_no_size():
    def measure(size):
        raise TooLate

    assert climb(measure, Clock(5.0).left) is None


def test_rounds_go_on_while_there_is_time_and_the_least_counts():
    clock, asked = Clock(10.0), []
    takes = iter([3.0, 1.0, 2.0, 1.0, 9.9])

    def do():
        asked.append(clock.left())
        return clock.work(next(takes))

    assert repeat({"a": (1.0, do)}, 3, clock.left) == {"a": 1.0}
    assert asked == [10.0, 7.0, 6.0]
    assert repeat({"a": (1.0, do)}, 3, clock.left) == {"a": 1.0}  # 3 seconds are left, then none to go again
    assert clock.left() < 4.0


def test_a_pass_that_would_be_late_is_not_begun():
    clock = Clock(5.0)
    passes = {"large": (100.0, lambda: clock.work(100.0)), "small": (1.0, lambda: clock.work(1.0))}
    with pytest.raises(TooLate):
        repeat(passes, 3, clock.left)
    assert clock.left() == 4.0


def test_a_gpu_is_not_calibrated(monkeypatch):
    monkeypatch.setattr(calibrate.devices, "detect", lambda device: detect("cpu"))
    with pytest.raises(UserError, match=r"cuda:0 .*only the CPU is calibrated.*--device cpu"):
        calibrate.calibrate(Place("cuda:0", "bfloat16", "asked for"))


def test_a_calibration_is_complete_whatever_the_time_does_for(monkeypatch, tmp_path):
    monkeypatch.setenv("FARTHING_CACHE", str(tmp_path))
    monkeypatch.setattr(calibrate, "climb", lambda *_: None)  # as where not even the smallest is done
    said = []
    found = calibrate.calibrate(Place("cpu", "float32", "asked for"), said.append)
    assert (found.device, found.dtype, found.timed) == (detect("cpu").name, "float32", 0)
    assert found.train.flop == pytest.approx(2.5 / found.gemm_float32)
    assert found.train.fixed > found.decode.fixed > 0
    assert found.optimizer > 0
    assert found.narrow >= 0
    assert len(said) == 5
    assert {path.name for path in tmp_path.iterdir()} <= {"kernels"}  # measuring keeps nothing


@pytest.mark.parametrize("dtype", ["float32"])
def test_the_smallest_probe_is_timed_in_that_dtype(dtype):
    found, optimizer = calibrate._measure(
        SIZES[0], Place("cpu", dtype, "asked for"), lambda: 1e9, lambda _: None
    )
    assert optimizer > 0
    for kind in ("prefill", "train"):
        assert all(found[kind, depth, q] > 0 for depth, q in SIZES[0].passes())
    probe = calibrate._Probe(SIZES[0], 1, Place("cpu", dtype, "asked for"))
    assert str(probe.decoder.embed.weight.dtype) == str(probe.engine.cache.keys[0].dtype) == f"torch.{dtype}"


@pytest.mark.slow
def test_this_machine_is_measured_with_its_network():
    found = calibrate.calibrate()
    assert found.device == detect("cpu").name
    assert max(found.gemm_bfloat16, found.gemm_float32) > 1e8
    assert found.bandwidth > 1e7
    assert found.train.flop > 0
