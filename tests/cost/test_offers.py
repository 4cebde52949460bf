import pytest

from farthing.cost import devices
from farthing.cost.devices import peak
from farthing.cost.ledger import Line
from farthing.cost.spend import AT_LEAST, SAME_SHARE, other_hardware, other_prices

H100, A100 = "NVIDIA H100 SXM 80GB", "NVIDIA A100 SXM 80GB"


def line(device: str = H100, **more) -> Line:
    usual = {
        "stage": "01-grpo", "activity": "train", "started": 1.7e9, "seconds": 3600.0, "device": device, "devices": 2,
        "tokens_in": 10, "tokens_out": 0, "flops": 10**18, "joules": 1.0, "joules_are": "measured",
        "usd": 5.9, "usd_rate": 2.95, "rate_source": "test", "status": "ok", "attempt": 1, "step": None,
    }  # fmt: skip
    return usual | more  # type: ignore[return-value]


def test_the_same_hours_at_every_other_price_of_the_device():
    offers = other_prices([line(), line(activity="load", flops=0)])
    listed = {price.usd for price in devices.find("h100").prices}
    assert {round(offer.usual / 4, 6) for offer in offers} == listed - {2.95}
    assert all(offer.assumption == "" and offer.source for offer in offers)
    assert other_prices([line("cpu: Example")]) == []


def test_counted_work_scales_and_the_rest_lasts_as_long():
    offers = {offer.device: offer for offer in other_hardware([line(), line(activity="idle", flops=0)])}
    assert H100 not in offers
    ratio = peak(devices.find("h100")) / peak(devices.find("a100"))
    assert offers[A100].seconds == pytest.approx(3600 * ratio + 3600)
    assert offers[A100].usual == pytest.approx(2 * (ratio + 1) * 1.95)
    assert offers[A100].low <= offers[A100].usual <= offers[A100].high
    assert offers[A100].assumption == SAME_SHARE


def test_from_a_device_of_unknown_peak_it_is_a_lower_bound():
    offers = {offer.device: offer for offer in other_hardware([line("cpu: Example", devices=1)])}
    best = devices.find("h100").measured_flops["bfloat16"]
    assert offers[H100].seconds == pytest.approx(1e18 / best)
    assert offers[H100].assumption == AT_LEAST


def test_no_work_no_offers():
    assert other_hardware([]) == []
    assert other_hardware([line(activity="idle", flops=0)]) == []
    assert other_prices([]) == []


def test_offers_come_cheapest_first():
    offers = other_hardware([line()])
    assert [offer.usual for offer in offers] == sorted(offer.usual for offer in offers)
