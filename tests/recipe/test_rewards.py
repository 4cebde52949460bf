"""Rewards as a recipe names them."""

import importlib.util
from pathlib import Path

import pytest

from farthing.base.errors import UserError
from farthing.recipe import RewardPart
from farthing.recipe.places import reading_from
from farthing.recipe.rewards import check_reward, default_reward

INSTALLED = importlib.util.find_spec("math_verify") is not None


def refused(use: str, **settings: object) -> str:
    with pytest.raises(UserError) as caught:
        check_reward(RewardPart(use=use, settings=settings), "tasks.mine.reward")
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("use", "settings", "said"),
    [
        ("nubmer", {}, "tasks.mine.reward: there is no verifier 'nubmer'; did you mean number?"),
        ("number", {"befor": 1}, "tasks.mine.reward: number: settings: befor: no such key"),
        ("exact", {"case": "yes"}, "exact: settings: case: must be true or false, got 'yes'"),
        ("regex", {}, "regex: settings: pattern: is missing"),
        ("regex", {"pattern": "("}, "pattern: is not one that Python can read"),
        ("regex", {"pattern": "(a)(b)"}, "pattern: has 2 groups"),
        ("json", {}, "give one, or equal: true"),
        ("json", {"schema": {"type": "objekt"}}, "json: settings: schema: 'objekt' is not valid"),
        ("code", {"seconds": 0}, "code: settings: seconds: must be above 0"),
        (
            "judge",
            {"url": "ftp://x", "model": "m"},
            "must be http://HOST[:PORT]/… or https://…, got 'ftp://x'",
        ),
        ("judge", {"url": "http://[::1", "model": "m"}, "must be http"),
        ("judge", {"url": "http://host:port/v1", "model": "m"}, "must be http"),
        ("judge", {"url": "http:///v1", "model": "m"}, "must be http"),
        ("judge", {"url": "http://x"}, "model: is missing"),
        ("judge", {"url": "http://x", "model": "m", "usd": 1.0}, "usd_per_million_in"),
        ("judge", {"url": "http://x", "model": "m", "prompt": "Good?"}, "{completion}"),
        ("judge", {"url": "", "model": "m"}, "url: "),
        ("judge", {"model": "m", "usd": 1.0}, "a judge without url costs this machine's time"),
        (
            "judge",
            {"model": "m", "usd_per_million_out": 1.0},
            "a judge without url costs this machine's time",
        ),
        ("judge", {"model": 3}, "model: "),
        ("reward_model", {}, "model: is missing"),
        ("reward_model", {"model": "m", "url": "http://x"}, "url: no such key"),
        ("mine.py", {}, "write a function of your own as my_rewards.py:function"),
        ("mine:score", {}, "write a function of your own as my_rewards.py:function"),
        ("nowhere.py:score", {}, "nowhere.py: no such file in "),
    ],
)
def test_mistakes_are_one_line(use: str, settings: dict[str, object], said: str) -> None:
    assert said in refused(use, **settings)


def test_a_file_is_read_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ran = tmp_path / "ran"
    (tmp_path / "mine.py").write_text(f"open({str(ran)!r}, 'w')\ndef score(question): ...\nmade = score\n")
    for name in ("score", "made"):
        part = check_reward(RewardPart(use=f"mine.py:{name}"), "reward")
        assert part.use == f"{tmp_path / 'mine.py'}:{name}"
        assert check_reward(part, "reward") == part
    assert not ran.exists()
    assert "mine.py has no function scor; did you mean score?" in refused("mine.py:scor")
    (tmp_path / "mine.py").write_text("x = 1\ndef score(:\n")
    assert "mine.py, line 2: is no Python" in refused("mine.py:score")
    (tmp_path / "mine.py").write_bytes(b"\0" * 2_000_000)
    assert "larger than 1 MB" in refused("mine.py:score")


def test_files_are_looked_for_beside_the_recipe_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("recipes", "here"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.py").write_text("def score(): ...\n")
    monkeypatch.chdir(tmp_path / "here")
    with reading_from(tmp_path / "recipes"):
        part = RewardPart(use="mine.py:score")
    assert part.use == check_reward(part, "reward").use == f"{tmp_path / 'recipes' / 'mine.py'}:score"
    assert RewardPart(use="mine.py:score").use == f"{tmp_path / 'here' / 'mine.py'}:score"


@pytest.mark.parametrize(
    ("golds", "choices", "name"),
    [
        (["A", "B"], True, "choice"),
        (["7", "-3", "1,234.50", "$5", "so\n#### 12"], False, "number"),
        (["7", "many"], False, "exact"),
        (["Paris", "Rome"], False, "exact"),
        ([], False, "exact"),
        (["\\frac{1}{2}", "7", "(1, 2)"], False, "math" if INSTALLED else "exact"),
    ],
)
def test_the_default_follows_the_gold_answers(golds: list[str], choices: bool, name: str) -> None:
    assert default_reward(golds, choices) == name


def test_models_are_looked_for_beside_the_recipe_and_other_names_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "recipes" / "scorer").mkdir(parents=True)
    (tmp_path / "small").mkdir()
    monkeypatch.chdir(tmp_path)
    with reading_from(tmp_path / "recipes"):
        for use in ("reward_model", "judge"):
            part = RewardPart(use=use, settings={"model": "scorer"})
            assert part.settings["model"] == str(tmp_path / "recipes" / "scorer")
        assert RewardPart(use="judge", settings={"model": "owner/name"}).settings["model"] == "owner/name"
        served = RewardPart(use="judge", settings={"model": "small", "url": "http://x"})
    assert served.settings["model"] == "small"  # the server's name for it


def test_a_reward_model_is_known_by_its_config(tmp_path: Path) -> None:
    for config, said in (
        ('{"architectures": ["LlamaForCausalLM"]}', "its architecture is LlamaForCausalLM"),
        ('{"architectures": "x"}', "its architecture is not said"),
        ('{"architectures": ["Qwen3ForSequenceClassification"]}', "is a classifier with 2 labels"),
        ("[]", "config.json"),
    ):
        (tmp_path / "config.json").write_text(config)
        assert said in refused("reward_model", model=str(tmp_path))
    (tmp_path / "config.json").write_text(
        '{"architectures": ["Qwen3ForSequenceClassification"], "id2label": {"0": "LABEL_0"}}'
    )
    check_reward(RewardPart(use="reward_model", settings={"model": str(tmp_path)}), "reward")
