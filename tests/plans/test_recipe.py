import dataclasses
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from farthing import plans
from farthing.base.device import Place
from farthing.base.errors import UserError
from farthing.cost import devices
from farthing.plans import calibrate as measuring
from farthing.plans import config_of, plan
from farthing.plans.calibrate import instructions
from farthing.plans.measured import Calibration, Pace, save
from farthing.plans.measured import load as calibration_of
from farthing.plans.recipe import beside_text, known_pass_rate, plan_beside_actual, plan_recipe, recipe_text
from farthing.plans.sampling import LESSON, decoding_steps, published_guess, survival
from farthing.recipe import load, validate
from farthing.recipe.work import Guess

SMOLLM = {
    "model_type": "llama", "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "intermediate_size": 1536, "vocab_size": 49152, "tie_word_embeddings": True,
}  # fmt: skip
QWEN_1_5B = {
    "model_type": "qwen2", "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
    "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936,
}  # fmt: skip
QWEN_32B = QWEN_1_5B | {
    "hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 64, "num_attention_heads": 40,
    "num_key_value_heads": 8, "vocab_size": 152064,
}  # fmt: skip
PACE = Pace(fixed=5e-4, flop=3e-12, head_fixed=1e-3, head_flop=3e-12)
FOUND = Calibration(
    date="2026-11-23", device="cpu: some", dtype="bfloat16", instructions="amx", threads=2, torch="2.13.0", took=8.0,
    timed=1152, gemm_float32=1e11,
    gemm_bfloat16=3e11, bandwidth=1e10, disk=4e8, small_op=1e-6, decode=PACE, prefill=PACE, train=PACE,
    optimizer=1.5e-9,
)  # fmt: skip
CPU = devices.find("cpu")
FLOAT32 = Place("cpu", "float32", "asked for")
QUICKSTART = load("quickstart")


def planned(recipe=QUICKSTART, base=SMOLLM, device=CPU, calibration=FOUND, **more):
    return plan_recipe(recipe, base, device, calibration, **more)


# ---- lengths of answers ----


@given(share=st.floats(0.01, 1), longest=st.integers(2, 4096))
def test_answers_have_the_mean_that_was_asked_for(share, longest):
    mean = max(1.0, share * longest)
    q = survival(mean, longest)
    total = longest if q == 1 else (1 - q**longest) / (1 - q)
    assert total == pytest.approx(mean, rel=1e-3)


@settings(max_examples=50)
@given(answers=st.integers(1, 500), longest=st.integers(2, 200), share=st.floats(0.05, 1))
def test_sampling_takes_as_long_as_its_longest_answer_or_longer(answers, longest, share):
    mean = max(1.0, share * longest)
    steps = decoding_steps(answers, 64, mean, longest)
    assert steps >= mean * 0.999
    assert steps >= answers * mean / 64 * 0.999
    assert steps <= math.ceil(answers / 64) * longest * 1.001


# ---- a recipe's plan ----


def test_a_plan_adds_up_and_is_ordered():
    found = planned()
    for low, likely, high in found.by_activity().values():
        assert low <= likely <= high
    assert found.wall_seconds.likely == pytest.approx(sum(found.likely.values()))
    assert found.usd.likely == pytest.approx(found.wall_seconds.likely * 0.08 / 3600)
    assert found.fits
    data = found.as_json()
    json.dumps(data, allow_nan=False)
    assert data["device_hours"]["likely"] == pytest.approx(found.wall_seconds.likely / 3600)
    assert data["params_total"] == 134_515_008
    assert "generate" in recipe_text(found)


def test_twice_the_steps_are_twice_the_work():
    twice = load("quickstart", ["stages.1.steps=48"])
    one, two = planned().likely, planned(twice).likely
    for activity in ("generate", "train"):
        assert two[activity] == pytest.approx(2 * one[activity], rel=1e-6)
    assert two["load"] == one["load"]
    assert two["evaluate"] == one["evaluate"]


def test_longer_answers_larger_groups_and_a_reference_cost_more():
    base = planned().likely
    assert (
        planned(load("quickstart", ["stages.1.max_new_tokens=160"])).likely["generate"] > 2 * base["generate"]
    )
    assert planned(load("quickstart", ["stages.1.group=16"])).likely["train"] > base["train"]
    assert planned(load("quickstart", ["stages.1.kl=0.1"])).likely["train"] > base["train"]


def test_samples_and_a_subset_between_steps_are_planned():
    def seconds(*changes):
        return planned(load("quickstart", [f"evaluate.{change}" for change in changes])).likely["evaluate"]

    once = seconds()
    assert seconds("samples=4", "temperature=0.6") > 1.5 * once  # the prompts are read once
    steps, held_out = QUICKSTART.stages[0].steps, QUICKSTART.evaluate.held_out
    asked = seconds("every=6", f"subset={held_out}")
    assert asked == pytest.approx(once * (2 + steps // 6) / 2)
    assert seconds("every=6", "subset=10") < asked


def test_the_flops_are_those_that_a_real_run_booked():
    """A quickstart run (seed 0) booked 11.0 TFLOP of training and 12.3 of sampling."""
    [_, stage, _] = planned().stages
    assert stage.flops == pytest.approx(23.3e12, rel=0.15)


def test_narrow_layers_and_routing_take_what_was_measured_of_them():
    """tiny-deepseek is 128 wide, with two layers of experts; quickstart's network is as wide as what is timed."""
    tiny = load("tiny-deepseek")
    narrow = dataclasses.replace(FOUND, narrow=2 * PACE.flop)
    routed = dataclasses.replace(FOUND, route=1e-5)
    plain = planned(tiny, None).likely["train"]
    assert 1.5 * plain < planned(tiny, None, calibration=narrow).likely["train"] < 2 * plain
    tokens = 4e6  # of pretraining; two layers and a prediction module's share of them
    assert planned(tiny, None, calibration=routed).likely["train"] > plain + 2 * tokens * 1e-5
    assert planned(calibration=dataclasses.replace(narrow, route=1e-5)).likely == planned().likely


def test_worked_solutions_are_made_before_they_are_taught():
    once = planned(load("tiny-deepseek"), None).likely["load"]
    more = planned(load("tiny-deepseek", ["stages.pretrain.data.1.items=120K"]), None).likely["load"]
    assert more - once == pytest.approx(60_000 * LESSON)


def test_muon_takes_longer_than_adamw_and_less_than_the_passes():
    def train(optimizer):
        changes = [f"stages.{kind}.optimizer={optimizer}" for kind in ("pretrain", "sft", "grpo")]
        return planned(load("tiny-deepseek", changes), None).likely["train"]

    assert train("adamw") < train("muon") < 2 * train("adamw")


def test_a_recipe_from_nothing_is_planned_by_its_dial():
    found = planned(load("tiny-deepseek"), None)
    assert found.likely["train"] > 0
    assert found.config["model_type"] == "deepseek_v3"
    assert [stage.name for stage in found.stages][:2] == ["00-base", "01-pretrain"]


def test_a_device_of_the_catalogue_is_limited_by_generation():
    found = planned(device=devices.find("h100"), calibration=None)
    assert found.limited_by == "generation"
    assert found.uncertainty > planned().uncertainty
    assert found.price == 2.95


def test_data_of_unknown_size_is_said():
    data = {"name": "talk", "base": "x", "stages": [{"kind": "sft", "data": ["not-here.jsonl"]}]}
    with pytest.raises(UserError, match=r"not-here.jsonl"):
        planned(validate(data))


def test_devices_share_the_work_and_the_states():
    h100 = devices.find("h100")
    one, eight = (planned(device=h100, calibration=None, count=count) for count in (1, 8))
    assert eight.count == eight.as_json()["count"] == eight.sharing.layout.data == 8
    assert eight.wall_seconds.likely < one.wall_seconds.likely
    assert eight.device_hours.likely > one.device_hours.likely / 3600, "and it is never cheaper"
    assert eight.usd.likely == pytest.approx(eight.device_hours.likely * 2.95)
    assert eight.memory_bytes < one.memory_bytes
    assert "Farthing trains on one device" in recipe_text(eight)
    assert "Farthing trains on one device" not in recipe_text(one)
    [_, whole, _], [_, share, _] = one.stages, eight.stages
    assert share.flops == pytest.approx(whole.flops, rel=0.01)


def test_states_are_sharded_and_experts_split_where_they_must_be():
    def shared(gigabytes, base=SMOLLM):
        device = dataclasses.replace(devices.find("h100"), memory_bytes=int(gigabytes * 1e9))
        return planned(base=base, device=device, calibration=None, count=8).sharing

    roomy, tighter, tight = shared(80), shared(1.1), shared(0.9)
    assert (roomy.layout.zero, roomy.recompute, roomy.fused_loss) == (1, "none", False)
    assert (tighter.layout.zero, tighter.recompute) == (1, "full")
    assert tight.layout.zero == 3
    assert tight.layout.expert == shared(0.01).layout.expert == 1, "there are no experts"
    mixture = SMOLLM | {
        "model_type": "qwen3_moe", "num_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 512,
        "head_dim": 64,
    }  # fmt: skip
    assert shared(1.2, mixture).layout.expert == 8


def test_s1_and_deepscaler_as_recipes_are_within_a_factor_of_two():
    """As in test_methods.py, which has the sources; a recipe asks for lengths of answers, not for steps' times."""
    sft = {"kind": "sft", "data": ["s1k.jsonl"], "steps": 315, "batch_tokens": 96_000, "length": 6_000}
    s1 = planned(
        validate({"name": "s1", "base": "x", "stages": [sft]}), QWEN_32B, devices.find("h100"), None, count=16
    )
    assert s1.fits
    assert s1.sharing.layout.zero == 3
    assert 6.93 / 2 < s1.device_hours.likely < 6.93 * 2
    hours = 0.0
    stages = ((8, 8192, 8, 1040, 4500.0), (32, 16384, 16, 480, 4500.0), (32, 24576, 16, 230, 5500.0))
    for count, longest, group, steps, length in stages:
        stage = {
            "kind": "grpo", "tasks": {"math": 1.0}, "prompts": 128, "group": group, "max_new_tokens": longest,
            "steps": steps, "kl": 0.001,
        }  # fmt: skip
        recipe = validate({"name": "deepscaler", "base": "x", "stages": [stage]})
        found = planned(recipe, QWEN_1_5B, devices.find("a100"), None, count=count, answer_length=length)
        assert found.fits
        hours += found.device_hours.likely
    assert 3800 / 2 < hours < 3800 * 2


def test_what_is_known_of_the_answers_is_used():
    base = planned().likely
    long, short = (planned(answer_length=tokens).likely["generate"] for tokens in (30, 5))
    assert long > base["generate"] > short, "12.8 of 32 tokens"
    assert planned(kept=1.0).likely["train"] > base["train"]
    assert "answers are 20 tokens long" in recipe_text(planned(answer_length=20))
    for bad in ({"answer_length": 0.0}, {"kept": 0.0}, {"kept": 1.5}, {"count": 0}, {"count": 129}):
        with pytest.raises(UserError, match="--"):
            planned(**bad)


def test_larger_models_are_guessed_from_what_was_published():
    assert published_guess(SMOLLM).answer == 0.40
    large = SMOLLM | {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32}
    assert published_guess(large).answer == 0.55
    assert "DeepScaleR" in published_guess(large).source


# ---- what it refuses ----


def test_rewards_that_are_never_earned_are_refused():
    with pytest.raises(UserError, match=r"none of the answers right.*sft"):
        planned(pass_rate=0.0)
    with pytest.raises(UserError, match=r"--pass-rate 1\.5"):
        planned(pass_rate=1.5)
    assert planned(pass_rate=0.1).fits


def test_an_earlier_run_tells_its_pass_rate(tmp_path):
    assert known_pass_rate(tmp_path) is None
    (tmp_path / "results.json").write_text(
        json.dumps({"evaluations": [{"name": "after", "accuracy": 0.5}, {"name": "before", "accuracy": 0.0}]})
    )
    assert known_pass_rate(tmp_path) == 0.0


def test_too_large_for_the_device_names_a_change(tmp_path, monkeypatch):
    large = SMOLLM | {
        "hidden_size": 8192,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "intermediate_size": 28672,
    }
    (tmp_path / "config.json").write_text(json.dumps(large))
    monkeypatch.chdir(tmp_path)
    recipe = load("quickstart", [f"base={tmp_path}"])
    with pytest.raises(UserError, match=r"does not fit .* TB of its 24 GB; take a smaller base"):
        plan(recipe, device="4090")


# ---- beside what it took ----


def test_plan_and_actual_stand_side_by_side():
    found = planned()
    seconds = {"generate": 100.0, "train": 80.0, "idle": 2.0}
    beside = plan_beside_actual(found, seconds, usd=0.004)
    json.dumps(beside, allow_nan=False)
    assert beside["by_activity"]["generate"] == pytest.approx(found.likely["generate"])
    assert beside["by_activity"]["idle"] == 0
    assert beside["actual"]["wall_seconds"] == 182
    assert beside["actual"]["usd"] == 0.004
    assert beside["ratio"] == pytest.approx(found.wall_seconds.likely / 182)
    text = beside_text(beside)
    assert "1.7 min" in text
    assert "planned" in text


# ---- names ----


def test_a_config_is_found_as_file_folder_or_table(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(SMOLLM))
    assert config_of(tmp_path / "config.json") == config_of(tmp_path) == SMOLLM
    byname = plan(tmp_path / "config.json", tokens="1B", device="a100-40gb", count=8)
    assert plan(SMOLLM, tokens=1e9, device="a100-40gb", count=8).flops == byname.flops


@pytest.mark.parametrize("text", ["{", "[]", "{}", ""])
def test_a_file_that_is_no_config_is_said(tmp_path, text):
    (tmp_path / "broken.json").write_text(text)
    with pytest.raises(UserError, match=r"broken.json.*give"):
        config_of(tmp_path / "broken.json")


def test_a_file_that_is_not_there_is_said(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        config_of(tmp_path / "nothing.json")


def test_a_network_needs_tokens_and_a_recipe_needs_none():
    with pytest.raises(UserError, match="--tokens"):
        plan(SMOLLM)
    with pytest.raises(UserError, match="leave --tokens"):
        plan("quickstart", tokens="1B")


def here(**changes):
    """A calibration of this machine, in float32."""
    own = {"device": devices.detect("cpu").name, "instructions": instructions(), "dtype": "float32"}
    return dataclasses.replace(FOUND, **own | changes)


def test_this_machine_is_measured_once(tmp_path, monkeypatch):
    monkeypatch.setenv("FARTHING_CACHE", str(tmp_path))
    monkeypatch.setattr(plans, "choose", lambda *_: FLOAT32)
    save(here())
    assert plans.this_machine() == here()
    assert plans.this_machine(FLOAT32) == here()
    measured = plan(SMOLLM, tokens="1M", device="cpu", count=1, seq_len=512)
    assert measured.measured
    assert measured.device_hours.likely > 0


@pytest.mark.parametrize(
    "other", [{"device": "cpu: another"}, {"instructions": "sse4"}, {"instructions": "avx2, plain torch"}]
)
def test_what_another_machine_or_other_instructions_did_is_measured_again(tmp_path, monkeypatch, other):
    monkeypatch.setenv("FARTHING_CACHE", str(tmp_path))
    monkeypatch.setattr(measuring, "instructions", lambda: "avx2")
    monkeypatch.setattr(measuring, "calibrate", lambda place, say: here(instructions="avx2"))
    save(here(**{"instructions": "avx2"} | other))
    assert plans.this_machine(FLOAT32) == here(instructions="avx2")
    assert calibration_of("float32") == here(instructions="avx2"), "it is kept"


def test_a_plan_is_made_though_it_cannot_be_kept(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FARTHING_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(measuring, "calibrate", lambda place, say: here())
    said = []
    assert plans.this_machine(FLOAT32, said.append) == here()
    assert "not kept" in said[-1]


def test_a_recipe_is_planned_in_the_dtype_that_it_asks_for(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(SMOLLM))
    monkeypatch.setenv("FARTHING_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for dtype in ("float32", "bfloat16"):
        save(here(dtype=dtype))
        found = plan(load("quickstart", [f"base={tmp_path}", f"dtype={dtype}", "device=cpu"]))
        assert found.dtype == found.as_json()["dtype"] == dtype
        assert f"in {dtype}" in recipe_text(found)
    assert found.device == devices.detect("cpu")


def test_float32_counts_four_bytes():
    wide, narrow = (planned(calibration=here(dtype=dtype)) for dtype in ("float32", "bfloat16"))
    [_, wide, _], [_, narrow, _] = wide.stages, narrow.stages
    compiled = 2 * 134_515_008  # the sampler's weights are bfloat16 in either
    wide_weights, narrow_weights = (found.memory.weights - compiled for found in (wide, narrow))
    assert 2 * 4 * 134_515_008 >= wide_weights > 1.9 * 4 * 134_515_008, "oneDNN's layout besides"
    assert wide_weights == pytest.approx(2 * narrow_weights, rel=1e-4)
    assert wide.memory.gradients == narrow.memory.gradients == 4 * 134_515_008
    assert wide.memory.optimizer == narrow.memory.optimizer == 12 * 134_515_008, "masters and two moments"
    assert wide.memory.cache == 2 * narrow.memory.cache


def test_float32_is_slower_on_a_device_of_the_catalogue():
    h100 = devices.find("h100")
    recipe = load("quickstart", ["dtype=float32"])
    wide, narrow = planned(recipe, SMOLLM, h100, None), planned(QUICKSTART, SMOLLM, h100, None)
    assert (wide.dtype, narrow.dtype) == ("float32", "bfloat16")
    assert wide.likely["train"] > narrow.likely["train"]
    assert wide.likely["generate"] > narrow.likely["generate"]
    assert wide.memory_bytes > narrow.memory_bytes
    assert "in float32" in str(wide.assumptions)


def test_what_was_timed_little_is_less_certain():
    much, little, nothing = (planned(calibration=here(timed=timed)).uncertainty for timed in (1152, 48, 0))
    assert much < little < nothing
    assert "not timed" in recipe_text(planned(calibration=here(timed=0)))


def test_a_run_is_planned_only_on_a_machine_that_was_measured(tmp_path, monkeypatch):
    monkeypatch.setenv("FARTHING_CACHE", str(tmp_path))
    recipe, place = load("quickstart", ["dtype=float32", "device=cpu"]), Place("cpu", "float32", "asked for")
    assert plans.for_run(recipe, SMOLLM, place) is None
    save(here(device="cpu: another"))
    assert plans.for_run(recipe, SMOLLM, place) is None
    save(here())
    found = plans.for_run(recipe, SMOLLM, place)
    assert found is not None
    assert found.wall_seconds.likely > 0
    assert plans.for_run(recipe, SMOLLM, Place("cpu", "bfloat16", "as the run was started")) is None
    assert plans.for_run(recipe, {"model_type": "unheard of"}, place) is None


def test_a_run_too_large_for_its_device_is_refused_before_it_starts(monkeypatch):
    place = Place("cpu", "float32", "")
    here = dataclasses.replace(devices.find("cpu"), name="cpu: small", memory_bytes=int(3e9))
    monkeypatch.setattr(devices, "detect", lambda _: here)
    with pytest.raises(
        UserError, match=r"quickstart does not fit on cpu: small: it needs \d\.\d+ GB of its 3 GB; "
    ):
        plans.for_run(QUICKSTART, SMOLLM, place)
    monkeypatch.setattr(devices, "detect", lambda _: dataclasses.replace(here, memory_bytes=int(30e9)))
    plans.for_run(QUICKSTART, SMOLLM, place)


def test_lora_is_advised_only_where_it_is_enough(monkeypatch):
    place = Place("cpu", "float32", "")

    def advice(gigabytes):
        here = dataclasses.replace(devices.find("cpu"), memory_bytes=int(gigabytes * 1e9))
        monkeypatch.setattr(devices, "detect", lambda _: here)
        with pytest.raises(UserError) as said:
            plans.for_run(QUICKSTART, SMOLLM, place)
        return str(said.value)

    whole = plan_recipe(QUICKSTART, SMOLLM, devices.find("cpu"), None, dtype="float32").memory_bytes
    lighter = plan_recipe(
        load("quickstart", ["stages.1.lora=16"]), SMOLLM, devices.find("cpu"), None, dtype="float32"
    ).memory_bytes
    assert "set lora: 16" in advice((whole + lighter) / 2 / 1e9)
    assert "lora" not in advice(lighter / 2 / 1e9)


def test_with_a_kl_term_groups_without_an_advantage_are_trained_on_too():
    guess = Guess(answer=0.5, kept=0.25, prompt=20.0)
    grpo = QUICKSTART.stages[-1]
    kept, everyone = (grpo.model_copy(update={"kl": kl}).work(SMOLLM, guess) for kl in (0.0, 0.1))
    assert everyone.training_steps == 1
    assert everyone.scored == pytest.approx(grpo.prompts * grpo.group * 0.5 * grpo.max_new_tokens)
    assert kept.scored * kept.training_steps == pytest.approx(everyone.scored / 4)
