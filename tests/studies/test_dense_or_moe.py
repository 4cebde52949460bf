"""The study: networks of equal active parameters whatever the size, text that is never in both sets, runs done once."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from farthing.base.errors import UserError
from farthing.cost.flops import parameters
from farthing.data.text import Document
from farthing.recipe import Pretrain, validate
from farthing.recipe.dial import dial

SCRIPT = Path(__file__).parents[2] / "studies" / "dense_or_moe.py"
spec = importlib.util.spec_from_file_location("dense_or_moe", SCRIPT)
assert spec is not None
assert spec.loader is not None
module = importlib.util.module_from_spec(spec)
sys.modules["dense_or_moe"] = module
spec.loader.exec_module(module)


def study(out: Path = Path("x"), **keys: Any) -> Any:
    given_keys = {
        "size": 1_000_000, "vocab_size": 2048, "length": 256, "tokens": 800_000, "batch_tokens": None, "warmup": 10,
        "validate_every": 5, "rates": {"adamw": 2e-3, "muon": None},
    }  # fmt: skip
    return module.Study(out=out, **given_keys | keys)


def stages(made: dict[str, dict[str, Any]]) -> dict[str, Pretrain]:
    found = {name: validate(data).stages[0] for name, data in made.items()}
    assert all(isinstance(stage, Pretrain) for stage in found.values())
    return found  # type: ignore[return-value]


@given(size=st.integers(300_000, 2_000_000_000))
@settings(max_examples=10, deadline=None)
def test_every_family_has_the_size_and_the_same_shape(size: int) -> None:
    found = stages(module.recipes(study(size=size, rates={"muon": None}), module.FAMILIES, 2048))
    assert list(found) == [f"{family}-muon" for family in module.FAMILIES]
    dialled = [dial(stage, 2048) for stage in found.values()]
    for stage in found.values():
        assert module.active(stage, 2048) == pytest.approx(size, rel=module.TOLERANCE)
    for key in ("num_hidden_layers", "hidden_size", "tie_word_embeddings", "vocab_size"):
        assert len({one.config[key] for one in dialled}) == 1, key
    assert len({(one.steps, one.batch_tokens, one.warmup, one.lr) for one in dialled}) == 1


def test_the_families_differ_in_what_they_are_named_for() -> None:
    found = stages(module.recipes(study(), module.FAMILIES, 2048))
    configs = {name: dial(stage, 2048).config for name, stage in found.items()}
    assert [configs[f"{family}-adamw"]["model_type"] for family in module.FAMILIES] == [
        "llama", "glm4_moe", "deepseek_v3", "deepseek_v3",
    ]  # fmt: skip
    assert [configs[f"{family}-adamw"].get("num_nextn_predict_layers", 0) for family in module.FAMILIES] == [
        0,
        0,
        0,
        1,
    ]
    total = {name: parameters(config).total for name, config in configs.items()}
    assert total["moe-adamw"] > 2 * total["dense-adamw"]  # the experts that wait
    assert found["moe-adamw"].lr == 2e-3
    assert 1e-4 < (found["moe-muon"].lr or 0) < 1e-2  # the law's


def test_a_size_that_no_network_has_is_refused() -> None:
    with pytest.raises(UserError, match=r"--size: no \w+ network of .* change --size"):
        module.recipes(study(size=4000), module.FAMILIES, 2048)


def test_families_take_turns() -> None:
    order = list(module.in_turn(["dense-adamw", "moe-adamw", "dense-muon", "moe-muon"], 2))
    assert order == [
        ("dense-adamw", 0), ("moe-adamw", 0), ("dense-muon", 0), ("moe-muon", 0),
        ("moe-adamw", 1), ("dense-adamw", 1), ("moe-muon", 1), ("dense-muon", 1),
    ]  # fmt: skip


@given(texts=st.lists(st.text(max_size=200), max_size=5), characters=st.integers(1, 50))
def test_passages_are_the_text_and_slices_are_short(texts: list[str], characters: int) -> None:
    documents = [Document(text, "x") for text in texts]
    cut = list(module.passages(documents, characters))
    assert "".join("".join(text.split()) for text in texts) == "".join("".join(d.text.split()) for d in cut)
    assert all(len(document.text) <= 1.5 * characters for document in cut)
    assert sum(len(document.text) for document in module.slices(documents, characters)) <= characters


@pytest.fixture
def books(tmp_path: Path) -> Path:
    path = tmp_path / "books.jsonl"
    lines = [
        {"text": f"Book {n}. " + " ".join(f"{n} and {k} make {n + k}." for k in range(60))} for n in range(40)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def command(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *words], capture_output=True, text=True, timeout=900)


TINY = [
    "--size", "40K", "--vocab-size", "271", "--tokens", "1K", "--batch-tokens", "128", "--length", "32", "--seeds", "1",
    "--families", "dense,mla", "--warmup", "0", "--validate-every", "2", "--validate-on", "2K",
]  # fmt: skip


def mistake(capfd: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line on standard error of a command that is refused."""
    capfd.readouterr()
    assert module.command_line(list(words)) == 2
    said = capfd.readouterr().err
    assert said.startswith("dense_or_moe: ")
    assert said.count("\n") == 1
    return said


def test_a_study_runs_what_is_missing_and_compares(
    books: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "study"
    how = ["--data", str(books), "--out", str(out), *TINY]
    done = command(*how)
    assert done.returncode == 0, done.stderr
    assert "At equal tokens (" in done.stdout
    names = ["dense-adamw-1", "dense-muon-1", "mla-adamw-1", "mla-muon-1"]
    assert sorted(path.parent.name for path in out.glob("*/results.json")) == names
    assert {"adamw-flops.svg", "adamw-tokens.svg", "muon-flops.svg"} <= {
        path.name for path in out.glob("*.svg")
    }
    kept = {json.loads(line)["text"] for line in (out / "data" / "validation.jsonl").open()}
    train = (out / "data" / "train.jsonl").read_text()
    assert kept
    assert not any(text in train for text in kept)
    stamp = (out / "dense-adamw-1" / "results.json").stat().st_mtime_ns
    (out / "mla-muon-1" / "results.json").unlink()  # as if killed before the end
    again = command(*how)
    assert again.returncode == 0, again.stderr
    assert again.stdout == done.stdout
    assert "dense-adamw-1" not in again.stderr
    assert (out / "dense-adamw-1" / "results.json").stat().st_mtime_ns == stamp
    for changed, said in [
        (["--data", "other.jsonl"], "was started with data"),
        (["--tokens", "2K"], "was started with tokens 1000, now 2000"),
        (
            ["--warmup", "1"],
            "was started with warmup 0, now 1; give the same settings to continue it, or another --out",
        ),
    ]:
        assert said in mistake(capfd, *how, *changed)
    (out / "settings.json").unlink()  # the runs themselves refuse too
    assert "dense-muon-1 was started with another stages.1.lr (0.004, now 0.001)" in mistake(
        capfd, *how, "--muon", "1e-3"
    )


def test_ctrl_c_says_that_the_command_continues(books: Path, tmp_path: Path) -> None:
    how = ["--data", str(books), "--out", str(tmp_path / "study"), *TINY, "--tokens", "4M"]
    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a background job ignores it, and its children
    try:
        study = subprocess.Popen([sys.executable, str(SCRIPT), *how], stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, before)
    with study:
        assert study.stderr is not None
        try:
            while not study.stderr.readline().startswith("1 of 4"):
                assert study.poll() is None
            os.kill(study.pid, signal.SIGINT)
            said = study.stderr.read()
        finally:
            study.kill()
    assert (study.returncode, said) == (
        130, "dense_or_moe: interrupted; finished runs are kept, and the same command continues\n",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--data", "nowhere.jsonl"], "nowhere.jsonl does not exist"),
        (
            ["--data", "x", "--families", "dense,moo"],
            "--families dense,moo: name each of dense, moe, mla, mtp",
        ),
        (["--data", "x", "--families", "dense"], "name at least two of dense, moe, mla, mtp"),
        (["--data", "x", "--adamw", "nan"], "--adamw nan: must be a learning rate"),
        (["--data", "x", "--validation", "2"], "--validation 2: must be a share"),
        (["--data", "x", "--tokens", "many"], "--tokens: 'many'"),
        (["--data", "x", "--seeds", "0"], "Invalid value for '--seeds'"),
        (["--data", "x", "--sedes", "3"], "No such option: --sedes"),
        ([], "Missing option '--data'"),
        (
            ["--data", "x", "--families", "dense", "--seeds", "1"],
            "--families dense: name at least two of",
        ),
        (["--data", "x", "--tokens", "8K", "--validate-every", "5"], "1 step would be validated only once"),
    ],
)
def test_a_mistake_is_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert said in mistake(capfd, *words, "--out", str(tmp_path / "out"))
    assert not list(tmp_path.glob("out/*-*"))  # before any training
    assert not (tmp_path / "out" / "settings.json").exists()  # so the mistake can be mended


def test_an_out_that_cannot_be_written_and_a_share_of_no_document_are_refused(
    books: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    how = ["--data", str(books), *TINY]
    assert "cannot be written (Not a directory)" in mistake(capfd, *how, "--out", str(books / "x"))
    out = ["--out", str(tmp_path / "out")]
    assert "falls on none of the documents" in mistake(capfd, *how, *out, "--validation", "1e-9")
    assert "leaves no document" in mistake(capfd, *how, *out, "--validation", "0.999999999")
