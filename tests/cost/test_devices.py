import sys
import types

import pytest

from farthing.base.errors import UserError
from farthing.cost import devices
from farthing.cost.devices import Device, catalogue, cpu_cores, detect, find, rate


def test_every_entry_has_figures_a_source_and_dated_prices():
    assert len(catalogue()) >= 20
    for device in catalogue():
        assert device.source, device.name
        assert device.evidence, device.name
        assert device.memory_bytes > 1e9, device.name
        assert device.bytes_per_second > 1e9, device.name
        assert device.watts > 0, device.name
        assert max(device.peak_flops.values()) > 1e11, device.name
        for dtype, flops in device.measured_flops.items():
            assert flops <= device.peak_flops[dtype], device.name
        for price in device.prices:
            assert price.usd > 0
            assert price.source
            assert price.date.startswith("20")


def test_short_names_are_unique():
    keys = [key for device in catalogue() for key in devices._keys(device)]
    assert len(keys) == len(set(keys))


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("h100", "NVIDIA H100 SXM 80GB"),
        ("NVIDIA H100 80GB HBM3", "NVIDIA H100 SXM 80GB"),
        ("H100-80GB", "NVIDIA H100 SXM 80GB"),
        ("h100_pcie", "NVIDIA H100 PCIe 80GB"),
        ("A100-SXM4-80GB", "NVIDIA A100 SXM 80GB"),
        ("NVIDIA A100-PCIE-40GB", "NVIDIA A100 PCIe 40GB"),
        ("NVIDIA H200", "NVIDIA H200 SXM 141GB"),
        ("NVIDIA GeForce RTX 4090", "NVIDIA RTX 4090"),
        ("RTX-4090", "NVIDIA RTX 4090"),
        ("4090", "NVIDIA RTX 4090"),
        ("AMD Instinct MI300X", "AMD MI300X"),
        ("CPU", "cpu"),
    ],
)
def test_names_are_forgiven(written, name):
    assert find(written).name == name


def test_unknown_name_gives_the_nearest():
    with pytest.raises(UserError, match=r"'h10o'.*h100"):
        find("h10o")
    with pytest.raises(UserError, match="the names known are cpu, h100"):
        find("")


def test_rate_is_the_catalogue_first_price_with_its_source():
    usd, source = rate(find("h100"))
    assert usd == 2.95
    assert "median" in source
    assert "2026-05" in source


def test_override_wins_and_says_so():
    assert rate(find("h100"), {"h100": 1.11}) == (1.11, "set in the recipe")
    assert rate(find("a100 pcie"), {"a100": 1.0, "h100": 9})[0] == 1.0
    assert rate(find("a100 pcie"), {"a100": 5.0, "a100 pcie": 0.7})[0] == 0.7


def test_override_equal_to_a_catalogue_price_keeps_the_source():
    assert "crusoe" in rate(find("h100"), {"H100": 3.9})[1]


@pytest.mark.parametrize("usd", [0, -1.5, float("nan"), float("inf"), "2", True, None])
def test_a_price_has_to_be_above_zero(usd):
    with pytest.raises(UserError, match="h100"):
        rate(find("cpu"), {"h100": usd})


def test_a_mistyped_override_is_no_silent_default():
    with pytest.raises(UserError, match="h1000"):
        rate(find("h100"), {"h1000": 2.0})


def test_unpriced_device_asks_for_a_rate_and_takes_one():
    with pytest.raises(UserError, match=r"rates: \{h20:"):
        rate(find("h20"))
    assert rate(find("h20"), {"h20": 1.0})[0] == 1.0
    unlisted = Device(name="Tesla T4", kind="gpu")
    with pytest.raises(UserError, match="Tesla T4"):
        rate(unlisted)
    assert rate(unlisted, {"t4": 0.35})[0] == 0.35


def test_detect_names_the_cpu_and_scales_the_rate(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(devices, "cpu_cores", lambda: 8)
    device = detect()
    assert device.name.startswith("cpu: ")
    assert len(device.name) > len("cpu: ")
    assert device.cores == 8
    assert rate(device)[0] == pytest.approx(0.32)
    assert "8 vCPUs at 0.04" in rate(device)[1]
    assert rate(device, {"cpu": 0.5}) == (0.5, "set in the recipe")
    assert device.memory_bytes > 1e8
    assert cpu_cores() >= 1


def _torch_with(name: str) -> types.SimpleNamespace:
    properties = types.SimpleNamespace(name=name, total_memory=16 * 10**9)
    return types.SimpleNamespace(
        cuda=types.SimpleNamespace(
            is_available=lambda: True, current_device=lambda: 0, get_device_properties=lambda _: properties
        )
    )


def test_detect_takes_the_gpu_of_a_loaded_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", _torch_with("NVIDIA H200"))
    assert detect().name == "NVIDIA H200 SXM 141GB"
    monkeypatch.setitem(sys.modules, "torch", _torch_with("Tesla T4"))
    assert detect() == Device(name="Tesla T4", kind="gpu", memory_bytes=16 * 10**9)
