"""Public functions with wrong types: refused by the argument's name."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import farthing
from farthing import UserError, recipe
from farthing.base.arguments import takes
from farthing.claims import claim
from farthing.weights import sources

MODEL = Path(__file__).parents[1] / "runs/data/run-0.1.0/stages/01-pretrain/model"
ODD = [
    None, 1, 1.5, "x", b"x", [], {}, True, math.nan, math.inf, 10**400, -1, Path("x"), "a\0b", "\ud800", "x" * 300,
    object(), [1], {"a": 1}, ("a",), set(), lambda: 1, "", [[]], {1: 2},
]  # fmt: skip


@takes(
    text=(str,),
    whole=(int, None),
    number=(float,),
    path=(str, Path),
    table=(Mapping,),
    many=(Sequence,),
    yes=(bool,),
)
def example(
    text: Any = "",
    whole: Any = None,
    number: Any = 0.5,
    path: Any = "",
    table: Any = (),
    many: Any = (),
    yes: Any = 0,
) -> str:
    return "called"


@pytest.mark.parametrize(
    "given",
    [{"text": "x"}, {"whole": 1}, {"whole": None}, {"whole": np.int64(3)}, {"number": 1}, {"number": np.float32(1)},
     {"path": Path("x")}, {"table": {}}, {"many": ()}, {"many": [1]}, {"yes": True}, {}],
)  # fmt: skip
def test_right_types_pass(given: dict[str, Any]) -> None:
    assert example(**given) == "called"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"text": 1}, "text: must be a text, got 1"),
        ({"text": b"x"}, "text: must be a text, got a bytes"),
        ({"whole": 1.5}, "whole: must be a whole number or None, got 1.5"),
        ({"whole": True}, "got true"),
        ({"whole": 10**400}, "got a number of hundreds of digits"),
        ({"number": math.nan}, "number: must be a number, got nan"),
        ({"number": -math.inf}, "got -inf"),
        ({"number": "1"}, "got '1'"),
        ({"path": None}, "path: must be a text or a path, got nothing"),
        ({"table": [1]}, "table: must be a table, got a list of 1"),
        ({"many": "text"}, "many: must be a list, got 'text'"),
        ({"yes": 1}, "yes: must be true or false, got 1"),
    ],
)
def test_wrong_types_are_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        example(**given)
    assert message in str(caught.value)


def mistakes(act: Callable[[Any], Any], values: Sequence[Any] = ODD) -> int:
    """How many of these values are refused in one sentence; any other error fails the test."""
    said: list[str] = []
    for value in values:
        try:
            act(value)
        except UserError as error:
            said.append(str(error))
    assert not [message for message in said if "\n" in message or len(message) > 500]
    return len(said)


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    "act", [farthing.load, farthing.run, recipe.load, recipe.validate, claim.load, sources.resolve]
)
def test_a_function_refuses_every_odd_source(act: Callable[[Any], Any]) -> None:
    assert mistakes(act) == len(ODD)


def test_options_of_loading_and_running() -> None:
    assert mistakes(lambda value: farthing.load(MODEL, dtype=value)) == len(ODD)
    assert mistakes(lambda value: farthing.load(MODEL, device=value)) == len(ODD)
    others = [value for value in ODD if value is not None and not isinstance(value, str | Path)]
    assert mistakes(lambda value: farthing.run("quickstart", run_dir=value), [*others, "a\0b", "x" * 300]) > 5


LLAMA = {
    "model_type": "llama", "hidden_act": "silu", "vocab_size": 304, "hidden_size": 64, "intermediate_size": 160,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5, "rope_theta": 10_000.0, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.mark.parametrize("key", ["tokens", "device", "count", "seq_len", "precision", "price"])
def test_options_of_planning(key: str) -> None:
    assert mistakes(lambda value: farthing.plan(LLAMA, **{"tokens": 1e9, key: value})) > 15
    assert mistakes(farthing.plan) == len(ODD)


def test_a_model_s_methods() -> None:
    model = farthing.load(MODEL, dtype="float32")
    assert mistakes(lambda value: model.generate(value, max_new_tokens=1)) > 15
    assert mistakes(lambda value: model.generate([value], max_new_tokens=1)) > 15
    assert mistakes(lambda value: model.chat(value, max_new_tokens=1)) > 15
    assert mistakes(lambda value: model.chat([value], max_new_tokens=1)) > 15
    assert (
        mistakes(lambda value: list(model.stream([{"role": "user", "content": value}], max_new_tokens=1))) > 5
    )
    assert mistakes(model.logits) == len(ODD)
    assert mistakes(model.save, [value for value in ODD if not isinstance(value, str | Path)]) > 15
    for key in ("temperature", "top_k", "top_p", "min_p", "seed", "stop", "stop_ids", "nonsense"):
        assert (
            mistakes(lambda value, key=key: model.generate("a", **{"max_new_tokens": 1, key: value})) > 10
        ), key
    shapes = [torch.zeros(1, 2), torch.zeros(2).long(), torch.full((1, 2), 10**6), torch.zeros(1, 0).long(),
              torch.full((1, 2), -1), torch.zeros(1, 2, 3).long(), torch.ones(1, 2).bool()]  # fmt: skip
    assert mistakes(model.logits, shapes) == len(shapes)
