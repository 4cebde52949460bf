"""What the stages of a recipe may say: the kinds, their short forms, and what is wrong said in a sentence."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from farthing.base.errors import UserError
from farthing.recipe import Grpo, Pretrain, Recipe, Sft, dump, load, validate

SUMS = {"chain_sum": {"weight": 1, "config": {"max_terms": 2}}}
PRETRAIN = {"kind": "pretrain", "data": ["books.jsonl"], "size": "12M"}
SFT = {"kind": "sft", "data": [{"tasks": SUMS, "items": "2K"}]}
GRPO = {"kind": "grpo", "tasks": {"gcd": 1}, "steps": 3, "answer": "tag", "max_new_tokens": 50}


def recipe(*stages: dict[str, Any], **keys: Any) -> Recipe:
    return validate({"name": "test", "stages": [dict(stage) for stage in stages], **keys})


def mistake(*stages: dict[str, Any], **keys: Any) -> str:
    with pytest.raises(UserError) as caught:
        recipe(*stages, **keys)
    return str(caught.value)


def test_each_kind_is_a_class_of_its_own() -> None:
    whole = recipe(PRETRAIN, SFT, GRPO)
    assert [type(stage) for stage in whole.stages] == [Pretrain, Sft, Grpo]
    assert whole.base is None


def test_what_is_dumped_reads_back_equal(tmp_path: Path) -> None:
    whole = recipe(PRETRAIN | {"validation": "apart.txt", "model": {"hidden_size": 64}}, SFT, GRPO)
    (tmp_path / "r.yaml").write_text(dump(whole))
    assert load(tmp_path / "r.yaml") == whole
    said = yaml.safe_load(dump(whole))["stages"]
    for stage, model in zip(said, (Pretrain, Sft, Grpo), strict=True):
        assert set(stage) == set(model.model_fields)
    assert said[0]["size"] == 12_000_000


def test_every_key_says_what_it_means() -> None:
    for model in (Pretrain, Sft, Grpo):
        assert [key for key, field in model.model_fields.items() if not field.description] == ["kind"]


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("12M", 12_000_000),
        ("1.5B", 1_500_000_000),
        ("300k", 300_000),
        ("2 T", 2 * 10**12),
        (7, 7),
        ("8e3", 8000),
        ("many", None),
    ],
)
def test_amounts_as_people_say_them(said: Any, meant: int | None) -> None:
    if meant is None:
        assert "stages.1.size: must be a whole number, or one such as 12M" in mistake(
            PRETRAIN | {"size": said}
        )
        return
    stage = recipe(PRETRAIN | {"size": said}).stages[0]
    assert isinstance(stage, Pretrain)
    assert stage.size == meant


@given(number=st.integers(1, 999), unit=st.sampled_from(["", "K", "M", "B", "T"]))
def test_any_amount_is_its_number_times_its_unit(number: int, unit: str) -> None:
    stage = recipe(PRETRAIN | {"tokens": f"{number}{unit}"}).stages[0]
    assert isinstance(stage, Pretrain)
    assert stage.tokens == number * 1000 ** ["", "K", "M", "B", "T"].index(unit)


def test_a_source_is_a_path_or_a_table() -> None:
    stage = recipe(PRETRAIN | {"data": ["a.txt", {"path": "b", "weight": 2, "field": "body"}]}).stages[0]
    assert isinstance(stage, Pretrain)
    assert [(s.path, s.weight, s.field) for s in stage.data] == [("a.txt", 1.0, None), ("b", 2.0, "body")]


@pytest.mark.parametrize(
    ("stages", "keys", "said"),
    [
        ([PRETRAIN | {"size": "12X"}], {}, "size: must be a whole number, or one such as 12M or 1.5B, got '12X'"),
        ([PRETRAIN | {"size": 0}], {}, "stages.1.size: must be at least 1, got 0"),
        ([PRETRAIN | {"depth": 4}], {}, "stages.1: give the dial: either size"),
        ([{"kind": "pretrain", "data": ["x"]}], {}, "stages.1: give the dial: either size"),
        ([PRETRAIN | {"data": []}], {}, "stages.1.data: must not be empty"),
        ([PRETRAIN | {"data": [3]}], {}, "stages.1.data.1: must be a path, or a table"),
        ([PRETRAIN | {"data": [{"weight": 2}]}], {}, "stages.1.data.1: a source has either a path or tasks"),
        ([PRETRAIN | {"data": [{"tasks": SUMS}]}], {}, "stages.1.data.1: tasks and items go together"),
        ([PRETRAIN | {"validation": 1.5}], {}, "stages.1.validation: must be a share above 0 and below 1"),
        ([PRETRAIN | {"validation": True}], {}, "stages.1.validation: must be a share of the documents or a path"),
        ([PRETRAIN | {"batch_tokens": 64, "length": 128}], {}, "batch_tokens (64) must hold one row of length (128)"),
        ([PRETRAIN | {"mtp_depth": 1, "family": "llama"}], {}, "mtp_depth needs family: deepseek"),
        ([PRETRAIN | {"famly": "moe"}], {}, "stages.1.famly: no such key; did you mean family?"),
        ([PRETRAIN | {"group": 8}], {}, "stages.1.group: no such key; the keys are kind, data, "),
        ([PRETRAIN | {"family": "lama"}], {}, "got 'lama'; did you mean llama?"),
        ([PRETRAIN], {"base": "x"}, "base: a pretrain stage starts from nothing; leave base out"),
        ([SFT, PRETRAIN], {"base": "x"}, "stages: a pretrain stage starts from nothing, so it can only be the first"),
        ([SFT], {}, "base: is missing (Where the weights come from"),
        ([PRETRAIN], {"evaluate": {}}, "evaluate.tasks: no stage has tasks of its own"),
        ([{"data": ["x"]}], {"base": "x"}, "stages.1.kind: is missing (the kinds are pretrain, sft, grpo)"),
        ([{"kind": "stf", "data": ["x"]}], {"base": "x"}, "got 'stf'; did you mean sft?"),
        ([SFT | {"data": [{"tasks": SUMS, "itms": 5}]}], {"base": "x"}, "itms: no such key; did you mean items?"),
    ],
)  # fmt: skip
def test_mistakes_are_named(stages: list[dict[str, Any]], keys: dict[str, Any], said: str) -> None:
    assert said in mistake(*stages, **keys)


def test_a_stage_that_is_no_table_is_a_mistake() -> None:
    with pytest.raises(UserError, match=r"stages\.1: must be a table, got 3"):
        validate({"name": "test", "stages": [3]})


def test_what_is_evaluated_is_what_the_last_stage_with_tasks_asks() -> None:
    same: dict[str, Any] = {"evaluate": {"held_out": 5}}
    assert recipe(PRETRAIN, SFT, GRPO, **same).evaluation_tasks().keys() == {"gcd"}
    assert recipe(PRETRAIN, SFT, **same).evaluation_tasks().keys() == {"chain_sum"}
    named = recipe(PRETRAIN, SFT, GRPO, evaluate={"tasks": {"lcm": 1}})
    assert named.evaluation_tasks().keys() == {"lcm"}


def test_questions_are_asked_as_the_stage_of_rewards_asks_them() -> None:
    asks = recipe(PRETRAIN, SFT, GRPO, SFT, evaluate={"tasks": {"lcm": 1}}).asks()
    assert (asks.answer, asks.prompt, asks.max_new_tokens) == ("tag", "{question}", 50)
    assert asks.tasks.keys() == {"lcm"}
    alone = recipe(SFT, base="x", evaluate={"max_new_tokens": 9}).asks()
    assert (alone.answer, alone.system, alone.max_new_tokens) == ("final", None, 9)
    assert recipe(SFT, base="x").asks().max_new_tokens == 1024


def test_set_reaches_a_source_by_the_stages_kind(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({"name": "r", "stages": [PRETRAIN, SFT, GRPO]}))
    changed = load(
        tmp_path / "r.yaml", ["stages.sft.data.1.items=5K", "stages.pretrain.model.hidden_size=64"]
    )
    pretrain, sft, _ = changed.stages
    assert isinstance(pretrain, Pretrain)
    assert isinstance(sft, Sft)
    assert sft.data[0].items == 5000
    assert pretrain.model == {"hidden_size": 64}
