import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farthing.base.errors import UserError
from farthing.base.figures import letters, parse_amount
from farthing.cost import devices
from farthing.cost.memory import check_latent
from farthing.plans.published import published_runs
from farthing.plans.training import plan_text, plan_training

NAMED = {run.name: run for run in published_runs()}
SMALL = NAMED["pythia-160m"].config
DEEPSEEK = NAMED["deepseek-v3-pretrain"].config


def planned(config=SMALL, **more):
    given = {"tokens": 3e11, "device": devices.find("a100-40gb"), "count": 32, "seq_len": 2048}
    return plan_training(config, **(given | more))


# ---- what it says ----


def test_deepseek_v3_is_planned_within_the_range():
    plan = planned(
        DEEPSEEK, tokens=14.8e12, device=devices.find("h800"), count=2048, seq_len=4096, precision="fp8"
    )
    assert plan.flops == pytest.approx(250.45e9 * 14.8e12, rel=1e-3)
    assert plan.parameters.total == pytest.approx(671e9, rel=1e-3)
    assert plan.device_hours.low < 2_664_000 < plan.device_hours.high
    assert plan.usd.likely == pytest.approx(2.0 * plan.device_hours.likely)
    assert plan.fits
    assert plan.layouts[0].layout.expert > 1


def test_the_text_model_of_a_nested_config_is_planned_and_the_plan_says_so():
    nested = {"model_type": "a-model-of-images", "text_config": SMALL, "vision_config": {}}
    plan, alone = planned(nested), planned(SMALL)
    assert plan.flops == alone.flops
    assert plan.layouts == alone.layouts
    assert plan.name == "a-model-of-images"
    assert "only the text model is counted" in plan_text(plan)
    assert "text model" not in plan_text(alone)


def test_a_plan_adds_up():
    plan = planned()
    for hours, wall, dollars in zip(plan.device_hours, plan.wall_hours, plan.usd, strict=True):
        assert wall == pytest.approx(hours / 32)
        assert dollars == pytest.approx(hours * plan.price)
    low, likely, high = plan.device_hours
    assert low < likely < high
    at_peak = plan.work.model / (312e12 * 3600)
    assert likely == pytest.approx(at_peak / plan.efficiency.likely)
    assert plan.mfu["full"] > plan.mfu["causal"] == pytest.approx(plan.efficiency.likely)
    assert plan.energy_kwh.likely == pytest.approx(likely * 0.4 * 0.7)


def test_the_json_has_what_was_promised():
    data = planned().as_json()
    json.dumps(data, allow_nan=False)
    for key in (
        "flops",
        "params_total",
        "params_active",
        "memory_bytes_per_device",
        "fits",
        "layout",
        "limited_by",
    ):
        assert key in data
    for key in ("device_hours", "usd", "energy_kwh", "wall_hours"):
        assert list(data[key]) == ["low", "likely", "high"]
    assert set(data["layout"]) >= {"data", "expert", "tensor", "pipeline", "micro_batch", "recompute", "zero"}
    assert data["flops_vector"]["linear"] > data["flops_vector"]["attention_causal"] > 0
    assert all(assumption["source"] for assumption in data["assumptions"])


def test_a_person_reads_range_layout_and_assumptions():
    text = plan_text(planned())
    assert " to " in text
    assert "causal" in text
    assert "full attention" in text
    assert "--validate" in text


def test_devices_are_found_if_nobody_says_how_many():
    plan = planned(
        NAMED["llama3.1-405b"].config, tokens=1e9, device=devices.find("h100"), count=None, seq_len=8192
    )
    assert plan.fits
    assert plan.count > 8  # a billion tokens want one device, the memory wants many


def test_multi_token_prediction_takes_time_but_is_not_in_the_flops_that_are_compared():
    device = devices.find("h800")
    without = planned(DEEPSEEK | {"num_nextn_predict_layers": 0}, device=device, count=2048)
    with_one = planned(DEEPSEEK, device=device, count=2048)
    assert with_one.flops == pytest.approx(without.flops)
    assert with_one.device_hours.likely > 1.02 * without.device_hours.likely


def test_no_price_is_said_not_made_up():
    plan = planned(device=devices.find("h20"))
    assert plan.usd is None
    assert "--price" in plan_text(plan)
    assert planned(device=devices.find("h20"), price=1.5).usd.likely > 0


# ---- what it refuses ----


def test_what_does_not_fit_names_the_cheapest_change():
    plan = planned(NAMED["llama2-70b"].config, device=devices.find("4090"), count=8, seq_len=4096)
    assert not plan.fits
    assert plan.limited_by == "memory"
    assert plan.remedy.startswith("use ")
    assert plan.as_json()["layout"] is None
    assert plan.remedy in plan_text(plan)


def test_a_latent_larger_than_what_it_replaces_is_refused():
    check_latent(DEEPSEEK)
    few = DEEPSEEK | {"num_key_value_heads": 1}
    with pytest.raises(UserError, match=r"kv_lora_rank 512: .* 576 .* 320 .* lower it to 256"):
        check_latent(few)
    with pytest.raises(UserError, match="kv_lora_rank"):
        planned(few)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"price": 0.0}, "--price 0"),
        ({"price": -1.0}, "--price -1"),
        ({"price": float("nan")}, "--price nan"),
        ({"count": 0}, "--count 0"),
        ({"seq_len": -5}, "--seq-len -5"),
        ({"precision": "int4"}, "--precision int4"),
        ({"precision": "fp8"}, "has no FP8"),
        ({"config": {"model_type": "lama"}}, "llama"),
    ],
)
def test_mistakes_are_one_sentence(change, said):
    with pytest.raises(UserError, match=said):
        planned(**change)


# ---- amounts ----


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("14.8T", 14.8e12),
        ("15T", 15e12),
        ("1.5e13", 1.5e13),
        ("300B", 3e11),
        ("12_000", 12e3),
        (7, 7.0),
        (" 2 m ", 2e6),
    ],
)
def test_amounts_as_people_write_them(text, value):
    assert parse_amount(text, "--tokens") == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "many", "15X", "-3", "0", "1e400", "T", "nan", "1.2.3"])
def test_what_is_no_amount_is_said(text):
    with pytest.raises(UserError, match="--tokens"):
        parse_amount(text, "--tokens")


@given(st.floats(1, 1e18))
def test_short_amounts_read_back(value):
    assert parse_amount(letters(value), "x") == pytest.approx(value, rel=1e-3)
