import sys
import types

import pytest

from farthing.base.errors import UserError
from farthing.cost import devices
from farthing.cost.devices import Device, catalogue, cpu_cores, detect, find, peak, rate


def test_every_entry_has_figures_a_source_and_dated_prices():
    assert len(catalogue()) >= 65
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
            assert not {"fixture", "assumed"} & set(f"{price.kind} {price.source}".split()), device.name


def test_geforce_cards_count_sums_in_float32():
    """Half of the advertised rate: twice the rate in float32."""
    cards = [device for device in catalogue() if any("GeForce" in alias for alias in device.aliases)]
    assert len(cards) >= 7
    for card in cards:
        assert card.peak_flops["bfloat16"] / card.peak_flops["float32"] == pytest.approx(2, rel=0.01), (
            card.name
        )


def test_a_die_is_half_a_card():
    for card, die in (("mi250", "mi250 gcd"), ("mi250x", "mi250x gcd")):
        whole, half = find(card), find(die)
        assert half.memory_bytes * 2 == whole.memory_bytes
        assert half.bytes_per_second * 2 == whole.bytes_per_second
        assert half.peak_flops["bfloat16"] * 2 == pytest.approx(whole.peak_flops["bfloat16"])


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
        ("NVIDIA A100-SXM4-40GB", "NVIDIA A100 SXM 40GB"),
        ("NVIDIA A100 80GB PCIe", "NVIDIA A100 PCIe 80GB"),
        ("a100 80 GiB", "NVIDIA A100 SXM 80GB"),
        ("NVIDIA H100 NVL", "NVIDIA H100 NVL 94GB"),
        ("NVIDIA H100 PCIe", "NVIDIA H100 PCIe 80GB"),
        ("H100 SXM5 80G", "NVIDIA H100 SXM 80GB"),
        ("NVIDIA GB300", "NVIDIA GB300 (per GPU)"),
        ("NVIDIA B300 SXM6 AC", "NVIDIA B300 SXM"),
        ("Tesla T4", "NVIDIA T4"),
        ("Tesla P100-PCIE-16GB", "NVIDIA P100 PCIe 16GB"),
        ("Tesla V100-SXM2-32GB", "NVIDIA V100 SXM2 32GB"),
        ("NVIDIA A10", "NVIDIA A10"),
        ("NVIDIA A10G", "NVIDIA A10G"),
        ("NVIDIA A40", "NVIDIA A40"),
        ("NVIDIA RTX A6000", "NVIDIA RTX A6000"),
        ("a6000", "NVIDIA RTX A6000"),
        ("NVIDIA L4", "NVIDIA L4"),
        ("NVIDIA L40", "NVIDIA L40"),
        ("NVIDIA L40S", "NVIDIA L40S"),
        ("NVIDIA RTX 6000 Ada Generation", "NVIDIA RTX 6000 Ada"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "NVIDIA RTX PRO 6000 Blackwell"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "NVIDIA RTX PRO 6000 Blackwell"),
        ("NVIDIA GeForce RTX 3060", "NVIDIA RTX 3060 12GB"),
        ("NVIDIA GeForce RTX 3090", "NVIDIA RTX 3090"),
        ("NVIDIA GeForce RTX 4070", "NVIDIA RTX 4070"),
        ("NVIDIA GeForce RTX 4080", "NVIDIA RTX 4080"),
        ("NVIDIA GeForce RTX 5090", "NVIDIA RTX 5090"),
        ("rtx 4090 24GB", "NVIDIA RTX 4090"),
        ("AMD Instinct MI250", "AMD MI250 (card of two)"),
        ("Apple M2", "Apple M2 (10-core GPU)"),
        ("m2", "Apple M2 (10-core GPU)"),
        ("Apple M2 Ultra", "Apple M2 Ultra (76-core GPU)"),
        ("M4 Max", "Apple M4 Max (40-core GPU)"),
        ("Ascend 910B", "Huawei Ascend 910B"),
        ("910c", "Huawei Ascend 910C"),
    ],
)
def test_names_are_forgiven(written, name):
    assert find(written).name == name


def test_every_name_and_alias_finds_its_device():
    for device in catalogue():
        for name in (device.name, *device.aliases):
            assert find(name) is device


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("h10o", "did you mean h100?"),
        ("a100 pcie", "may be any of a100 pcie 40gb, a100 pcie 80gb"),
        ("rtx 6000", "may be any of rtx 6000 ada, rtx pro 6000"),
        ("tpu", "may be any of tpu v4, tpu v5e"),
        ("Max", "may be any of m1 max, m2 max"),
        ("NVIDIA H200 NVL", "there is no device called"),
        ("NVIDIA GeForce RTX 4080 SUPER", "did you mean rtx4080"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "did you mean rtx4090"),
        ("NVIDIA GeForce RTX 4090 D", "did you mean rtx4090"),
        ("rtx 4090 48GB", "did you mean rtx4090"),
        ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", "did you mean rtx pro 6000?"),
        ("Quadro RTX 6000", "did you mean"),
        ("Tesla V100-SXM2-16GB", "did you mean v100"),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "did you mean h100?"),
        ("Apple M4 Ultra", "did you mean m3 ultra"),
        ("Apple M5", "the names known are"),
    ],
)
def test_no_name_is_taken_for_another_device(written, said):
    with pytest.raises(UserError) as caught:
        find(written)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_device_of_ones_own():
    device = find('{"flops": 1e15, "memory": 80e9, "usd": 2.0}')
    assert (peak(device), device.memory_bytes, rate(device)[0]) == (1e15, 80 * 10**9, 2.0)
    h100 = find("h100")
    assert device.bytes_per_second / 1e15 == pytest.approx(h100.bytes_per_second / peak(h100))
    assert device.watts / 1e15 == pytest.approx(h100.watts / peak(h100), rel=1e-3)
    assert "bandwidth and watts in an H100's proportion" in device.source
    full = ' {"name": "Mine", "flops": 5e13, "memory": 24000000000, "bandwidth": 9e11, "watts": 350}'
    device = find(full)
    assert (device.name, device.bytes_per_second, device.watts, device.source) == ("Mine", 9e11, 350, "given")
    assert device.prices == ()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not JSON; write"),
        ('{"flops": 1e15, }', "is not JSON"),
        ("{" * 100_000, "is not JSON"),
        ('{"flops": 1e15}', "has no memory (bytes)"),
        ('{"memory": 80e9}', "has no flops (FLOP/s in bf16 without sparsity)"),
        (
            '{"flops": 989, "memory": 80e9}',
            "flops has to be FLOP/s in bf16 without sparsity, a number from 1e+09",
        ),
        ('{"flops": 1e15, "memory": 80}', "memory has to be bytes"),
        ('{"flops": 1e15, "memory": true}', "memory has to be bytes"),
        ('{"flops": "1e15", "memory": 80e9}', "flops has to be"),
        ('{"flops": NaN, "memory": 80e9}', "flops has to be"),
        ('{"flops": 1e15, "memory": 80e9, "usd": 0}', "usd has to be dollars an hour"),
        ('{"flops": 1e15, "memory": 80e9, "usd": null}', "usd has to be dollars an hour"),
        ('{"flops": 1e15, "memory": 80e9, "bandwidth": 3350}', "bandwidth has to be bytes a second"),
        ('{"flops": 1e15, "memory": 80e9, "watts": -1}', "watts has to be watts"),
        ('{"flops": 1e15, "memory": 80e9, "price": 2}', "has no use for 'price'"),
        ('{"flops": 1e15, "memory": 80e9, "name": "a\\nb"}', "its name has to be text"),
        ('{"flops": 1e15, "flops": 2e15, "memory": 80e9}', "gives flops twice"),
    ],
)
def test_a_device_of_ones_own_is_checked(text, said):
    with pytest.raises(UserError) as caught:
        find(text)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_name_lists_all():
    with pytest.raises(UserError, match="the names known are cpu, h100"):
        find("")


def test_rate_is_the_catalogue_first_price_with_its_source():
    usd, source = rate(find("h100"))
    assert usd == 2.95
    assert "median" in source
    assert "2026-05" in source


def test_override_wins_and_says_so():
    assert rate(find("h100"), {"h100": 1.11}) == (1.11, "set in the recipe")
    assert rate(find("a100 pcie 40gb"), {"a100": 1.0, "h100": 9})[0] == 1.0
    assert rate(find("a100 pcie 40gb"), {"a100": 5.0, "a100 pcie": 0.7})[0] == 0.7


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
    unlisted = Device(name="Tesla K80", kind="gpu")
    with pytest.raises(UserError, match="Tesla K80"):
        rate(unlisted)
    assert rate(unlisted, {"k80": 0.35})[0] == 0.35


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


def _torch_with(name: str, memory: float) -> types.SimpleNamespace:
    properties = types.SimpleNamespace(name=name, total_memory=int(memory))
    return types.SimpleNamespace(
        cuda=types.SimpleNamespace(
            is_available=lambda: True, current_device=lambda: 0, get_device_properties=lambda _: properties
        )
    )


@pytest.mark.parametrize(
    ("name", "memory", "found"),
    [
        ("NVIDIA H200", 150.1e9, "NVIDIA H200 SXM 141GB"),
        ("Tesla T4", 15.6e9, "NVIDIA T4"),
        ("AMD Instinct MI250X", 68.7e9, "AMD MI250X (one die of two)"),
        ("NVIDIA GeForce RTX 3060", 12.5e9, "NVIDIA RTX 3060 12GB"),
    ],
)
def test_detect_takes_the_gpu_of_a_loaded_torch(monkeypatch, name, memory, found):
    monkeypatch.setitem(sys.modules, "torch", _torch_with(name, memory))
    assert detect().name == found


@pytest.mark.parametrize(("name", "memory"), [("Tesla K80", 12e9), ("NVIDIA GeForce RTX 3060", 8.6e9)])
def test_a_gpu_with_other_memory_is_not_the_catalogues(monkeypatch, name, memory):
    monkeypatch.setitem(sys.modules, "torch", _torch_with(name, memory))
    assert detect() == Device(name=name, kind="gpu", memory_bytes=int(memory))
