import contextlib
import copy
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from farthing.base.errors import UserError
from farthing.claims import claim as claims
from farthing.claims.claim import Claim, builtin, load, parse
from farthing.cost.flops import parameters
from farthing.plans.published import published_runs

SMALL: dict[str, Any] = {
    "name": "small",
    "title": "A small claim",
    "about": "Nobody made it.",
    "reported": {"device": "h100", "devices": 8, "hours": 10, "dollars": 240},
    "sources": [
        {
            "of": ["device", "devices", "hours", "dollars"],
            "text": "a test",
            "date": "2026",
            "evidence": "read",
        }
    ],
}


def small(**more: Any) -> dict[str, Any]:
    return copy.deepcopy(SMALL) | more


@pytest.mark.parametrize("name", builtin())
def test_every_claim_that_ships_is_read_and_sourced(name):
    claim = load(name)
    assert claim.name == name
    assert all(source.date and source.text for source in claim.sources)
    assert all(gap.source and gap.date for gap in claim.excluded if gap.multiple or gap.amount)


@pytest.mark.parametrize("name", ["deepseek-v3", "deepseek-r1", "llama-3.1-405b", "sky-t1", "nanochat"])
def test_the_claims_that_were_asked_for_are_there(name):
    assert name in builtin()


def test_rows_that_a_claim_calls_its_own_exist():
    rows = {run.name for run in published_runs()}
    own = {name for claim in map(load, builtin()) for name in claim.same_runs}
    assert "deepseek-v3-pretrain" in own
    assert own - rows <= {"nanochat-run1"}, "nanochat's hours are published, its sizes are not"


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("deepseek-v3", 671.0), ("llama-3.1-405b", 405.9), ("llama-3.3-70b", 70.6), ("sky-t1", 32.8),
        ("opt-175b", 175.0), ("bloom-176b", 176.2), ("falcon-180b", 179.5), ("smollm3", 3.08),
        ("llmc-gpt3-125m", 0.125),
    ],
)  # fmt: skip
def test_an_architecture_has_the_parameters_of_its_model(name, billions):
    architecture = load(name).architecture
    assert architecture is not None
    assert parameters(architecture).total / 1e9 == pytest.approx(billions, rel=0.01)


def test_a_file_of_your_own(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    assert load(str(path)).reported.devices == 8


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"reported": {"dollar": 5}}, "dollars"),
        ({"reported": {"dollars": 0}}, "above 0"),
        ({"reported": {"dollars": "5"}}, "a number"),
        ({"reported": {"tokens": 1e12}}, "no source is given for tokens"),
        ({"sources": []}, "must not be empty"),
        (
            {"sources": [{"of": ["fame"], "text": "x", "date": "2026", "evidence": "read"}], "reported": {}},
            "not a figure",
        ),
        ({"excluded": [{"what": "data", "amount": [1, 2]}]}, "a range needs a source"),
        ({"excluded": [{"what": "data", "amount": [2, 1], "source": "x"}]}, "[low, high]"),
        ({"excluded": [{"what": "data", "amount": [1, 2], "multiple": [1, 2]}]}, "not both"),
        ({"params": 1e9, "architecture": {"model_type": "llama"}}, "not both"),
        ({"colour": "red"}, "no such key"),
        ({"reported": {"device": "h1000"}, "sources": SMALL["sources"]}, "h1000"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence_that_names_it(change, said):
    with pytest.raises(UserError) as caught:
        parse(small(**change), "mine.yaml")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [None, [], "text", 7])
def test_what_is_no_table_is_refused(data):
    with pytest.raises(UserError, match=r"^mine\.yaml: must be a table"):
        parse(data, "mine.yaml")


def test_a_wrong_name_gives_the_nearest():
    with pytest.raises(UserError, match="deepseek-v3"):
        load("deepseek-v4")
    with pytest.raises(UserError, match="cannot be read"):
        load("nowhere.yaml")


def test_a_name_never_leaves_the_folder_of_claims(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no such claim"):
        load("../recipes/quickstart")


@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*Claim.model_fields]), inner),
))  # fmt: skip
def test_no_file_breaks_the_reader(data):
    with contextlib.suppress(UserError):  # and no other exception
        parse(data, "any")


def test_parts_take_device_and_price_from_the_claim():
    claim = parse(
        small(
            reported={"device": "h100", "price_per_device_hour": 2.0},
            parts=[{"name": "a", "device_hours": 5}, {"name": "b", "device": "a100", "device_hours": 5}],
            sources=[SMALL["sources"][0] | {"of": ["device", "price_per_device_hour", "parts"]}],
        ),
        "mine",
    )
    assert [(name, part.device, part.price_per_device_hour) for name, part in claim.runs()] == [
        ("a", "h100", 2.0),
        ("b", "a100", 2.0),
    ]
    assert isinstance(next(claim.runs())[1], claims.Figures)


def test_the_claim_that_the_docs_show_is_one(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "claims.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"```yaml\n(name: example.*?)```", page, flags=re.S)
    path = tmp_path / "example.yaml"
    path.write_text(shown)
    claim = load(str(path))
    assert claim.reported.tokens == 20e9
    listed = set(re.findall(r"`(\w+)`", page.split("## A claim of your own")[1]))
    assert {*Claim.model_fields, *claims.Figures.model_fields} - {"name", "title", "about"} <= listed
