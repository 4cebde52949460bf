import multiprocessing
import os
import subprocess
import sys
import time
import types

import pytest

from farthing.cost import energy
from farthing.cost.devices import Device
from farthing.cost.energy import EnergyMeter

CPU = Device(name="cpu: test", kind="cpu")
GPU = Device(name="NVIDIA H100 SXM 80GB", kind="gpu", watts=700.0)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def no_rapl(monkeypatch):
    monkeypatch.setattr(energy, "package_counter", lambda now: None)


@pytest.fixture
def no_cpu(monkeypatch):
    """A host processor that draws nothing and is sure of it."""
    still = types.SimpleNamespace(joules_are="measured", joules=lambda now: 0.0)
    monkeypatch.setattr(energy, "package_counter", lambda now: still)


def burn(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_an_idle_cpu_draws_a_tenth_of_its_power(no_rapl, clock, monkeypatch):
    monkeypatch.setattr(energy, "cpu_watts", lambda: 100.0)
    meter = EnergyMeter(CPU, monotonic=clock)
    clock.now += 60
    joules, kind = meter.joules()
    assert kind == "estimated"
    assert joules == pytest.approx(600, rel=0.05)


def test_a_busy_core_draws_its_share(no_rapl, monkeypatch):
    monkeypatch.setattr(energy, "cpu_watts", lambda: 100.0)
    monkeypatch.setattr(energy, "cpu_cores", lambda: 2)
    meter = EnergyMeter(CPU)
    began = time.monotonic()
    burn(0.3)
    least = time.monotonic() - began
    joules, _ = meter.joules()
    most = time.monotonic() - began
    low, high = (100 * (0.1 * seconds + 0.9 * 0.3 / 2) for seconds in (least, most))
    assert 0.85 * low <= joules <= 1.15 * high


def _burn_and_wait(connection) -> None:
    burn(0.3)
    connection.send("done")
    connection.recv()


def test_the_work_of_a_living_child_counts_once(no_rapl, monkeypatch):
    monkeypatch.setattr(energy, "cpu_watts", lambda: 100.0)
    monkeypatch.setattr(energy, "cpu_cores", lambda: 1)
    monkeypatch.setattr(energy, "IDLE_SHARE", 0.0)
    monkeypatch.setattr(energy, "SCAN_SECONDS", 0.0)
    meter = EnergyMeter(CPU)
    ours, theirs = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=_burn_and_wait, args=(theirs,))
    child.start()
    assert ours.recv() == "done"
    alive, _ = meter.joules()
    assert alive >= 28
    ours.send("end")
    child.join()
    gone, _ = meter.joules()
    assert alive <= gone < alive + 15


def test_joules_never_fall(no_rapl, clock):
    meter = EnergyMeter(CPU, monotonic=clock)
    clock.now += 10
    first, _ = meter.joules()
    clock.now -= 5
    assert meter.joules()[0] == first


def test_known_processors_have_their_design_power(monkeypatch):
    monkeypatch.setattr(energy, "is_virtual", lambda: False)
    monkeypatch.setattr(energy, "packages", lambda: 2)
    monkeypatch.setattr(energy, "cpu_cores", lambda: os.cpu_count())
    for model, watts in [
        ("Intel(R) Xeon(R) CPU E5-2686 v4 @ 2.30GHz", 145),
        ("AMD EPYC 7763 64-Core Processor", 280),
        ("11th Gen Intel(R) Core(TM) i7-1165G7 @ 2.80GHz", 28),
        ("AMD Ryzen 7 5800H with Radeon Graphics", 45),
    ]:
        monkeypatch.setattr(energy, "cpu_model", lambda model=model: model)
        assert energy.cpu_watts.__wrapped__() == 2 * watts


@pytest.mark.parametrize(
    ("virtual", "model"), [(True, "AMD EPYC 7763 64-Core Processor"), (False, "Abacus 9000")]
)
def test_a_slice_of_a_processor_or_an_unknown_one_is_4_watts_a_core(monkeypatch, virtual, model):
    monkeypatch.setattr(energy, "is_virtual", lambda: virtual)
    monkeypatch.setattr(energy, "cpu_model", lambda: model)
    monkeypatch.setattr(energy, "cpu_cores", lambda: 6)
    assert energy.cpu_watts.__wrapped__() == 24


def test_rapl_counts_through_codecarbon(tmp_path, monkeypatch):
    """A package of the powercap tree, as the kernel lays it out."""
    cpu = pytest.importorskip("codecarbon.core.cpu")
    from codecarbon.core.units import Time

    base = tmp_path / "intel-rapl" / "subsystem"
    package = base / "intel-rapl" / "intel-rapl:0"
    package.mkdir(parents=True)
    (package / "name").write_text("package-0")
    (package / "max_energy_range_uj").write_text("262143328850")
    counter = package / "energy_uj"
    counter.write_text("1000000")
    rapl = energy._Rapl(cpu.IntelRAPL(rapl_dir=str(base)), Time, 0.0)
    counter.write_text("6000000")
    assert rapl.joules(1.0) == pytest.approx(5.0)
    counter.write_text("8500000")
    assert rapl.joules(2.0) == pytest.approx(7.5)
    assert rapl.joules(2.0) == pytest.approx(7.5)
    assert rapl.joules_are == "measured"


class Nvml(types.ModuleType):
    """NVML with one board whose counter and power are set by hand; None is not supported."""

    class NVMLError(Exception):
        pass

    def __init__(self, millijoules, milliwatts) -> None:
        super().__init__("pynvml")
        self.millijoules, self.milliwatts = millijoules, milliwatts

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def _give(self, value):
        if value is None:
            raise self.NVMLError
        return value

    def nvmlDeviceGetTotalEnergyConsumption(self, handle) -> int:
        return self._give(self.millijoules)

    def nvmlDeviceGetPowerUsage(self, handle) -> int:
        return self._give(self.milliwatts)


def gpu_meter(monkeypatch, clock, nvml, devices=1) -> EnergyMeter:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    return EnergyMeter(GPU, devices, monotonic=clock)


def test_a_gpu_s_counter_is_measured(monkeypatch, clock, no_cpu):
    nvml = Nvml(5_000_000, 300_000)
    meter = gpu_meter(monkeypatch, clock, nvml)
    clock.now += 10
    nvml.millijoules += 4_200_000
    assert meter.joules() == (4200.0, "measured")


@pytest.mark.parametrize("counter", [0, None])
def test_a_gpu_without_a_counter_is_power_times_time_not_zero(monkeypatch, clock, no_cpu, counter):
    nvml = Nvml(counter, 300_000)
    meter = gpu_meter(monkeypatch, clock, nvml, devices=2)
    clock.now += 10
    nvml.milliwatts = 500_000
    assert meter.joules() == (2 * 4000.0, "estimated")


def test_a_counter_that_begins_anew_loses_no_energy(monkeypatch, clock, no_cpu):
    nvml = Nvml(5_000_000, 300_000)
    meter = gpu_meter(monkeypatch, clock, nvml)
    clock.now += 10
    nvml.millijoules = 1000
    assert meter.joules() == (3000.0, "estimated")
    clock.now += 10
    nvml.millijoules += 2_000_000
    assert meter.joules() == (5000.0, "estimated")


def test_a_gpu_that_tells_nothing_is_its_limit_times_time(monkeypatch, clock, no_cpu):
    meter = gpu_meter(monkeypatch, clock, Nvml(None, None))
    clock.now += 2
    assert meter.joules() == (1400.0, "estimated")
    monkeypatch.setitem(sys.modules, "pynvml", None)
    meter = EnergyMeter(GPU, 2, monotonic=clock)
    clock.now += 2
    assert meter.joules() == (2800.0, "estimated")
    unlisted = EnergyMeter(Device(name="Tesla T4", kind="gpu"), monotonic=clock)
    clock.now += 1
    assert unlisted.joules()[0] > 0


def test_a_measured_gpu_in_an_estimated_host_is_estimated(monkeypatch, clock, no_rapl):
    nvml = Nvml(5_000_000, 300_000)
    meter = gpu_meter(monkeypatch, clock, nvml)
    clock.now += 10
    nvml.millijoules += 4_200_000
    joules, kind = meter.joules()
    assert kind == "estimated"
    assert joules > 4200


def test_starting_is_quick_silent_and_leaves_no_file(tmp_path):
    code = (
        "import time; began = time.process_time();"
        "from farthing.cost.energy import EnergyMeter; from farthing.cost.devices import Device;"
        "EnergyMeter(Device(name='c', kind='cpu')).joules(); print(time.process_time() - began)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, check=True, text=True
    )
    assert float(done.stdout) < 2
    assert done.stderr == ""
    assert list(tmp_path.iterdir()) == []
