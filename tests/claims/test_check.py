import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farthing.base.errors import UserError
from farthing.base.figures import exact
from farthing.claims.agree import AGREE
from farthing.claims.check import check
from farthing.claims.claim import builtin, load, parse
from farthing.claims.text import data, text
from farthing.cost import devices
from farthing.cost.devices import peak

LLAMA = load("llama-3.3-70b").architecture


def claim(reported: dict[str, Any], **more: Any):
    given = [*reported, *(name for name in ("parts", "architecture", "params") if name in more)]
    given = [name for name in given if name not in ("tokens_are", "precision")]
    sources = [{"of": given, "text": "a test", "date": "2026", "evidence": "read"}]
    named = {"name": "mine", "title": "Mine", "about": "Mine.", "reported": reported, "sources": sources}
    return parse(named | more, "mine")


def verdicts(found) -> dict[str, str]:
    return {line.about: line.verdict for line in found.lines}


# ---- what DeepSeek claimed, by numbers that were published elsewhere ----


def test_deepseek_v3():
    found = check(load("deepseek-v3"))
    (work,) = found.compute
    assert work.per_token is not None
    # 250 GFLOP a token causal, 280 full: arXiv:2505.09343 table 4 gives 385 and 432 TFLOP/s at the same speed
    assert work.per_token[0] / 1e9 == pytest.approx(250.45, abs=0.05)
    assert work.per_token[1] / 1e9 == pytest.approx(281.15, abs=0.05)
    assert work.mfu[0] == pytest.approx(0.3894, rel=0.01)
    assert work.mfu[1] == pytest.approx(0.4373, rel=0.01)
    assert work.tokens_per_second == pytest.approx(1541.7, rel=0.002)
    assert work.fp8_share == pytest.approx(work.mfu[0] / 2, rel=0.01)
    assert found.verdict == "plausible"
    assert verdicts(found) == {"arithmetic": "plausible", "compute": "plausible", "whole cost": "implausible"}
    assert found.whole_cost is not None
    assert found.whole_cost[0] > 8e6 > found.claim.reported.dollars
    assert "deepseek-v3-pretrain" not in {run.name for run in found.peers}


def test_a_run_cannot_vouch_for_itself():
    alone = load("deepseek-v3")
    named = check(alone.model_copy(update={"same_runs": []}))
    assert {run.name for run in named.peers} - {run.name for run in check(alone).peers} == {
        "deepseek-v3-pretrain"
    }


@pytest.mark.parametrize(
    ("name", "verdict", "about", "said"),
    [
        ("llmc-gpt3-125m", "implausible", "compute", "119.7% causal"),
        ("llama-3.3-70b", "implausible", "arithmetic", "g a kWh"),
        ("falcon-180b", "cannot be checked", "arithmetic", "2.5 times"),
        ("deepseek-r1-press", "implausible", "arithmetic", "1.26 times the $294,000"),
    ],
)
def test_claims_that_cannot_be_true_are_caught(name, verdict, about, said):
    found = check(load(name))
    assert found.verdict == verdict
    (line,) = [line for line in found.lines if line.about == about]
    assert line.verdict == verdict
    assert said in line.text


@pytest.mark.parametrize(
    ("name", "causal", "full"),
    [
        ("llama-3.1-405b", 35.9, 37.3), ("opt-175b", 35.0, 35.5), ("bloom-176b", 32.2, 32.6),
        ("falcon-180b", 48.3, 49.0), ("smollm3", 23.1, 25.1), ("nanochat-first", 50.0, 50.0),
    ],
)  # fmt: skip
def test_the_mfu_that_others_worked_out(name, causal, full):
    (work,) = check(load(name)).compute
    assert [100 * share for share in work.mfu] == pytest.approx([causal, full], abs=0.1)


def test_recomputed_work_is_recognised():
    (speed,) = [each for each in check(load("opt-175b")).checks if each.about == "speed"]
    assert "4/3" in speed.text


def test_what_was_not_published_is_not_judged():
    for name in ("deepseek-r1", "nanochat", "minimax-m1"):
        found = check(load(name))
        assert verdicts(found)["compute"] == "cannot be checked"
        assert found.verdict == "cannot be checked"


@pytest.mark.parametrize("name", builtin())
def test_every_line_has_its_sum_and_every_mfu_its_convention(name):
    found = check(load(name))
    said = text(found)
    assert [line.about for line in found.lines] == ["arithmetic", "compute", "whole cost"]
    assert all(line.text for line in found.lines)
    for line in said.splitlines():
        assert len(line) <= 100 or " " not in line.strip()
    flat = " ".join(said.split())
    stated = re.findall(r"MFU (?:at most )?[\d.]+%", flat)
    assert len(stated) == len(re.findall(r"MFU (?:at most )?[\d.]+% causal,? (?:and )?[\d.]+% full", flat))
    assert bool(stated) == bool(found.compute)
    assert data(found)["verdict"] == found.verdict


amount = st.floats(1e-6, 1e40)


NUMBERS = (
    "devices", "hours", "days", "device_hours", "price_per_device_hour", "dollars", "tokens", "flops",
    "mfu_percent", "tflops_per_device", "tokens_per_second_per_device", "energy_mwh", "tonnes_co2e",
)  # fmt: skip


@given(st.fixed_dictionaries({}, optional=dict.fromkeys(NUMBERS, amount)), st.booleans())
def test_any_figures_get_a_verdict_that_can_be_written(reported, sized):
    reported = reported | {"device": "h100"} | ({"seq_len": 4096} if "tokens" in reported else {})
    found = check(claim(reported, **({"architecture": LLAMA} if sized else {"params": 1e9})))
    assert found.verdict in ("plausible", "implausible", "cannot be checked")
    json.dumps(data(found), allow_nan=False)
    assert not re.search(r"\b(?:nan|inf)\b", text(found))


# ---- the sums ----

hours = st.floats(1, 1e8)


@given(hours, st.floats(0.1, 20), st.floats(0.2, 5))
def test_dollars_agree_with_hours_times_price_or_do_not(device_hours, price, factor):
    dollars = device_hours * price * factor
    found = check(claim({"device_hours": device_hours, "price_per_device_hour": price, "dollars": dollars}))
    expected = "plausible" if abs(1 / factor - 1) <= AGREE else "implausible"
    assert [each.verdict for each in found.checks if each.about == "price"] == [expected]
    assert verdicts(found)["arithmetic"] == expected


@given(st.integers(1, 100_000), st.floats(1, 1000), st.booleans())
def test_devices_times_days_are_hours(devices, days, doubled):
    device_hours = devices * days * 24 * (2 if doubled else 1)
    found = check(claim({"devices": devices, "days": days, "device_hours": device_hours}))
    assert verdicts(found)["arithmetic"] == ("implausible" if doubled else "plausible")


@given(st.floats(0.01, 3))
def test_mfu_is_what_it_was_made_from(share):
    top = peak(devices.find("a100"))
    tokens = 1e12
    per_token = 6 * 7e9
    device_hours = per_token * tokens / (share * top * 3600)
    found = check(claim({"device": "a100", "device_hours": device_hours, "tokens": tokens}, params=7e9))
    (work,) = found.compute
    assert work.mfu == pytest.approx((share, share))
    verdict = verdicts(found)["compute"]
    assert (
        verdict == "implausible"
        if share > 1
        else verdict in ("plausible", "implausible", "cannot be checked")
    )
    if share < 0.5:
        assert verdict == "plausible"


def test_an_upper_bound_of_tokens_is_never_too_fast():
    reported = {"device": "h100", "device_hours": 1, "tokens": 1e12, "seq_len": 4096}
    assert verdicts(check(claim(reported, architecture=LLAMA)))["compute"] == "implausible"
    bounded = check(claim(reported | {"tokens_are": "at most"}, architecture=LLAMA))
    assert verdicts(bounded)["compute"] == "cannot be checked"


def test_energy_that_no_board_draws():
    for mwh, verdict in ((0.7, "plausible"), (0.05, "implausible"), (2.0, "implausible")):
        found = check(claim({"device": "h100", "device_hours": 1000, "energy_mwh": mwh}))
        assert verdicts(found)["arithmetic"] == verdict, mwh


def test_a_rent_far_from_any_market():
    for dollars, verdict in ((3000, "plausible"), (30, "implausible"), (90_000, "implausible")):
        found = check(claim({"device": "h100", "device_hours": 1000, "dollars": dollars}))
        assert verdicts(found)["arithmetic"] == verdict, dollars


def test_an_average_faster_than_the_steady_speed():
    reported = {"device": "h100", "device_hours": 1000, "tokens": 1e10, "seq_len": 4096}
    for speed, verdict in ((3000, "plausible"), (2000, "implausible")):  # 2,778 tokens/s on average
        found = check(claim(reported | {"tokens_per_second_per_device": speed}, architecture=LLAMA))
        assert verdicts(found)["arithmetic"] == verdict


def test_the_same_work_on_other_hardware():
    found = check(claim({"device": "h100", "device_hours": 1000, "dollars": 2950}))
    by_name = {price.device: price for price in found.today}
    assert by_name["NVIDIA H100 SXM 80GB"].usual == pytest.approx(2950)
    a100 = by_name["NVIDIA A100 SXM 80GB"]
    assert a100.device_hours == pytest.approx(1000 * 989 / 312)
    assert a100.low <= a100.usual <= a100.high
    assert "NVIDIA H800 SXM 80GB" not in by_name, "an assumed price is no price today"
    assert "NVIDIA L4" not in by_name, "too little memory for what ran on 80 GB"


def test_tokens_need_a_length():
    with pytest.raises(UserError, match="seq_len"):
        check(claim({"device": "h100", "device_hours": 10, "tokens": 1e9}, architecture=LLAMA))


def test_an_unknown_architecture_is_one_sentence():
    strange = {"model_type": "abacus"}
    with pytest.raises(UserError, match="abacus"):
        check(
            claim({"device": "h100", "device_hours": 10, "tokens": 1e9, "seq_len": 9}, architecture=strange)
        )


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (2788000, "2,788,000"),
        (14.8e12, "14.8T"),
        (836e6, "836M"),
        (24.33, "24.33"),
        (8, "8"),
        (405.85e9, "405.9B"),
    ],
)
def test_big_numbers_are_written_as_people_write_them(value, said):
    assert exact(value) == said
