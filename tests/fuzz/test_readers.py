"""A target for each reader of files from elsewhere: whatever is in them, it reads them or says one sentence.

`make test` tries two hundred mutations for each target, the same ones every time; `make fuzz` tries many more, drawn
anew. What was once found stands as an explicit example.
"""

import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from farthing.base.errors import UserError
from farthing.claims import claim
from farthing.claims.check import check
from farthing.claims.text import data as claim_data
from farthing.claims.text import text as claim_text
from farthing.cost import ledger, spend
from farthing.cost.bill import bill_text
from farthing.data.shapes import placed_conversations
from farthing.data.text import Problems, documents
from farthing.data.tokenizer import Tokenizer
from farthing.plans.inspect import inspect
from farthing.recipe import builtin, dump, load
from farthing.weights.folder import read_tensors, tensor_files
from farthing.weights.gguf_read import import_gguf

Edits = list[tuple[str, float, bytes]]
LONG = os.environ.get("HYPOTHESIS_PROFILE") == "fuzz"
target = settings(
    max_examples=int(os.environ.get("FUZZ", 5000)) if LONG else 200,
    suppress_health_check=[
        HealthCheck.function_scoped_fixture,
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
    ],
)

# Bytes that readers trip over: signs of YAML and JSON, numbers beyond every type, halves of characters.
ODD = [
    b"\0", b"\xff", b"\xff\xff\xff\xff\xff\xff\xff\x7f", b"\n", b"\r", b"\t", b'"', b"'", b"{", b"}", b"[", b"]", b":",
    b",", b"&a", b"*a", b"!!bool x", b"!!int", b"<<: ", b"- ", b"null", b"true", b"NaN", b".inf", b"1e400", b"-1", b"0",
    b"1e18", b"9" * 400, b"\\ud800", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"[" * 3000, b"x" * 300, b"..", b"/",
]  # fmt: skip
edits = st.lists(
    st.tuples(
        st.sampled_from(["flip", "replace", "insert", "delete", "cut", "repeat"]),
        st.floats(0, 1, exclude_max=True),
        st.sampled_from(ODD) | st.binary(min_size=1, max_size=9),
    ),
    min_size=1,
    max_size=4,
)


def mutated(seed: bytes, changes: Edits) -> bytes:
    """A seed after some edits, each at a share of its length."""
    for kind, share, odd in changes:
        at = int(share * len(seed))
        if kind == "flip":
            seed = seed[:at] + bytes([seed[at] ^ 1 << odd[0] % 8]) + seed[at + 1 :] if seed else odd
        elif kind == "replace":
            seed = seed[:at] + odd + seed[at + len(odd) :]
        elif kind == "insert":
            seed = seed[:at] + odd + seed[at:]
        elif kind == "delete":
            seed = seed[:at] + seed[at + 1 + 3 * len(odd) :]
        elif kind == "cut":
            seed = seed[:at]
        else:
            seed = seed[:at] + seed[at : at + 50] * (1 + odd[0] % 20) + seed[at:]
    return seed


def one_sentence(act: Callable[[], Any]) -> Any:
    """What it gives; None if it is refused in one sentence. Any other error fails the test."""
    try:
        return act()
    except UserError as error:
        said = str(error)
    assert said
    assert "\n" not in said
    assert len(said) < 2000
    return None


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for the mutated files; also where relative paths in them lead."""
    folder, before = tmp_path_factory.mktemp("fuzz"), Path.cwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)


# ---- weights ----


@pytest.fixture(scope="module")
def tensors(place: Path) -> bytes:
    path = place / "seed.safetensors"
    save_file(
        {"a.weight": torch.ones(3, 4), "b": torch.zeros(2, dtype=torch.bfloat16)}, path, {"format": "pt"}
    )
    return path.read_bytes()


@target
@given(changes=edits)
@example(changes=[("replace", 0.0, b"\xff" * 8)])  # a header longer than the file
@example(changes=[("cut", 0.5, b"x")])
@example(changes=[("insert", 0.05, b'"a.weight":{"dtype":"F32","shape":[99],"data_offsets":[0,396]},')])
@example(changes=[("replace", 0.04, b"[" * 3000)])
def test_safetensors(place: Path, tensors: bytes, changes: Edits) -> None:
    (place / "model.safetensors").write_bytes(mutated(tensors, changes))
    if one_sentence(lambda: tensor_files(place)):
        one_sentence(lambda: list(read_tensors(place)))


# ---- what people write ----

RECIPES = [dump(load(name)) for name, _ in builtin()]


@target
@given(seed=st.sampled_from(RECIPES), changes=edits)
@example(seed="name: !!bool abc", changes=[])
@example(seed="name: x\nbase: y\nstages: [{kind: grpo, tasks: {chain_sum: .inf}, steps: 1e400}]", changes=[])
@example(seed="name: x\nstages: [{kind: pretrain, data: [x], size: .inf, vocab_size: 1e10}]", changes=[])
@example(seed='name: x\nbase: "a\\0b"\nstages: [{kind: sft, data: ["\\ud800"]}]', changes=[])
@example(seed="!!merge <<: {" * 300 + "}" * 300, changes=[])
@example(seed="? [a]\n: 1", changes=[])
@example(seed="a: !!timestamp 2024-02-30", changes=[])
def test_a_recipe(place: Path, seed: str, changes: Edits) -> None:
    path = place / "recipe.yaml"
    path.write_bytes(mutated(seed.encode(), changes))
    read = one_sentence(lambda: load(path))
    if read is not None:
        path.write_text(dump(read), encoding="utf-8")
        assert load(path) == read


CLAIMS = [
    (claim.resources.files("farthing") / "claims" / f"{name}.yaml").read_bytes() for name in claim.builtin()
]


@target
@given(seed=st.sampled_from(CLAIMS), changes=edits)
@example(seed=b"name: !!bool abc", changes=[])
@example(seed=CLAIMS[0].replace(b"date: ", b"date: 2024-02-30 #"), changes=[])
@example(seed=CLAIMS[0] + b"\nparams: 1e400\n", changes=[])
def test_a_claim(place: Path, seed: bytes, changes: Edits) -> None:
    path = place / "claim.yaml"
    path.write_bytes(mutated(seed, changes))

    def judge() -> None:
        found = check(claim.load(str(path)))
        json.dumps(claim_data(found), allow_nan=False)
        claim_text(found).encode()

    one_sentence(judge)


# ---- what runs leave ----

LINE = {
    "stage": "01-grpo", "activity": "train", "started": 1.7e9, "seconds": 2.5, "device": "cpu: test", "devices": 1,
    "tokens_in": 10, "tokens_out": 20, "flops": 10**12, "joules": 3.5, "joules_are": "measured", "usd": 0.01,
    "usd_rate": 3.6, "rate_source": "test", "status": "ok", "attempt": 1, "step": 3,
}  # fmt: skip
LEDGER = "".join(
    json.dumps(LINE | {"step": step, "started": 1.7e9 + step}) + "\n" for step in range(4)
).encode()


def with_value(key: str, value: object) -> bytes:
    return LEDGER + json.dumps(LINE | {key: value}).encode() + b"\n"


@target
@given(seed=st.just(LEDGER) | st.builds(with_value, st.sampled_from(list(LINE)), st.from_type(int | float | str)),
       changes=edits)  # fmt: skip
@example(seed=with_value("tokens_in", 10**400), changes=[])
@example(seed=with_value("started", 1e18), changes=[])
@example(seed=with_value("seconds", math.inf), changes=[])
@example(seed=with_value("stage", "\ud800"), changes=[])
@example(seed=with_value("attempt", 10**400), changes=[])
@example(seed=b"[" * 100_000, changes=[])
def test_a_ledger(place: Path, seed: bytes, changes: Edits) -> None:
    path = place / "ledger.jsonl"
    path.write_bytes(mutated(seed, changes))
    booked = spend.read_run(path)
    assert booked is not None
    for by in ("stage", "day"):
        rows = [(key, row) for (key,), row in spend.group([booked], by).items()]
        bill_text(booked.summary, "x", 120, rows, [], booked.notes).encode()
    json.dumps(spend.as_json([booked]), allow_nan=False)
    spend.as_csv([booked]).encode()
    ledger.clock_jumps(booked.lines)


# ---- data ----

ROWS = b"".join(
    json.dumps(row).encode() + b"\n"
    for row in (
        {"text": "a text", "n": 1},
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]},
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "é"}], "text": ""},
    )
)


@target
@given(changes=edits)
@example(changes=[("replace", 0.02, b"\\ud800")])
@example(changes=[("insert", 0.25, b"\xed\xa0\x80")])
@example(changes=[("replace", 0.0, b"[" * 3000)])
@example(changes=[("replace", 0.05, b"9" * 5000)])
def test_rows_of_data(place: Path, changes: Edits) -> None:
    path = place / "rows.jsonl"
    path.write_bytes(mutated(ROWS, changes))
    said: list[str] = []
    for document in documents(str(path), policy="skip", on_problem=said.append):
        document.text.encode()
    for conversation, _ in placed_conversations(str(path), Problems("skip", said.append)):
        json.dumps(conversation.texts, ensure_ascii=False).encode()
    for sentence in said:
        sentence.encode()
        assert "\n" not in sentence
        assert len(sentence) < 1000
    one_sentence(lambda: list(documents(str(path), policy="stop", on_problem=said.append)))


# ---- the other files of a model ----

MODEL = Path(__file__).parents[1] / "runs/data/run-0.1.0/stages/01-pretrain/model"
VALUES = [
    None,
    True,
    0,
    -1,
    1.5,
    10**6,
    10**400,
    1e300,
    math.inf,
    math.nan,
    "",
    "x",
    "\ud800",
    [],
    [1],
    {},
    {"a": 1},
]


def paths(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where each value of a JSON document is, of a list only the first three."""
    yield at
    for key in (
        value if isinstance(value, dict) else range(min(3, len(value))) if isinstance(value, list) else ()
    ):
        yield from paths(value[key], (*at, key))


def with_values(document: Any, changes: list[tuple[int, Any]]) -> Any:
    """A JSON document, values of it replaced; a place is given by its number."""
    document = json.loads(json.dumps(document))
    for number, value in changes:
        places = list(paths(document))[1:]
        if not places:
            break
        *above, last = places[number % len(places)]
        inner = document
        for key in above:
            inner = inner[key]
        inner[last] = json.loads(json.dumps(value))
    return document


values = st.lists(st.tuples(st.integers(0, 500), st.sampled_from(VALUES)), min_size=1, max_size=3)
CONFIG = json.loads((MODEL / "config.json").read_text())


def copy_model(place: Path) -> None:
    for each in MODEL.iterdir():
        (place / each.name).write_bytes(each.read_bytes())


@target
@given(changes=values)
def test_a_config(place: Path, changes: list[tuple[int, Any]]) -> None:
    copy_model(place)
    (place / "config.json").write_text(json.dumps(with_values(CONFIG, changes)))
    one_sentence(lambda: inspect(place))


@target
@given(changes=edits)
def test_the_text_of_a_config(place: Path, changes: Edits) -> None:
    copy_model(place)
    (place / "config.json").write_bytes(mutated((MODEL / "config.json").read_bytes(), changes))
    one_sentence(lambda: inspect(place))


def use_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer(folder)
    tokenizer.decode(tokenizer.encode("hi 7"))
    if tokenizer.has_template:
        tokenizer.chat_ids([{"role": "user", "content": "hi"}])


TOKENIZER = {
    name: json.loads((MODEL / name).read_text()) for name in ("tokenizer.json", "tokenizer_config.json")
}


@target
@given(name=st.sampled_from(sorted(TOKENIZER)), changes=values)
def test_a_tokenizer(place: Path, name: str, changes: list[tuple[int, Any]]) -> None:
    for each in MODEL.iterdir():
        if each.suffix == ".json":
            (place / each.name).write_bytes(each.read_bytes())
    (place / name).write_text(json.dumps(with_values(TOKENIZER[name], changes)))
    one_sentence(lambda: use_tokenizer(place))


TEMPLATE = TOKENIZER["tokenizer_config.json"]["chat_template"].encode()


@settings(target, max_examples=target.max_examples if LONG else 60)  # each starts a process
@given(changes=edits)
@example(changes=[("insert", 0.0, b"{% for a in range(10) %}")])
@example(changes=[("insert", 0.5, b"{{ raise_exception('\xc3\xa9\n\n') }}")])
def test_a_template(place: Path, changes: Edits) -> None:
    for each in MODEL.iterdir():
        if each.suffix == ".json":
            (place / each.name).write_bytes(each.read_bytes())
    (place / "chat_template.jinja").write_bytes(mutated(TEMPLATE, changes))
    one_sentence(lambda: use_tokenizer(place))


@settings(target, max_examples=target.max_examples // 3)
@given(changes=edits)
@example(changes=[("flip", 0.001, b"x")])
def test_a_gguf(place: Path, gguf: bytes, changes: Edits) -> None:
    (place / "m.gguf").write_bytes(mutated(gguf, changes))
    one_sentence(lambda: import_gguf(place / "m.gguf", place / "imported"))


@pytest.fixture
def gguf(write_gguf: Callable[..., Path]) -> bytes:
    return write_gguf().read_bytes()
