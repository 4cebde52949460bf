"""The pretraining stage: what it prepares, that it learns, and that dying changes nothing."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from farthing.base.device import Alone
from farthing.base.errors import UserError
from farthing.cost.meter import Meter
from farthing.data.overlap import HeldOut
from farthing.data.tokenizer import Tokenizer
from farthing.data.words import question_key
from farthing.engine import Model
from farthing.model.moe import routers
from farthing.recipe import Pretrain, validate
from farthing.stages.pretrain import Prepared, prepare_pretrain, train_pretrain
from farthing.stages.sources import copies, is_validation
from farthing.tasks.mixture import Mixture
from farthing.train.loop import Progress

SUMS = {"chain_sum": {"config": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}}}
WORDS = ["one", "two", "three", "four", "five", "six"]
Train = Callable[..., tuple[Model, list[dict[str, Any]]]]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of counting, each another."""
    path = tmp_path_factory.mktemp("text") / "counting.jsonl"
    lines = [
        {"text": f"{number}: " + " ".join(WORDS[number % 5 :] * (1 + number % 3))} for number in range(300)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def stage(text: Path) -> Callable[..., Pretrain]:
    def make(**keys: Any) -> Pretrain:
        small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        if keys.get("family", "deepseek") != "llama":
            small |= {"n_routed_experts": 4, "moe_intermediate_size": 32}
        settings = {
            "kind": "pretrain", "data": [str(text)], "validation": 0.1, "vocab_size": 280, "depth": 2,
            "model": small, "tokens": 768, "batch_tokens": 128, "length": 32, "lr": 5e-3, "validate_every": 3,
            "checkpoint_every": 2,
        }  # fmt: skip
        made = validate({"name": "t", "stages": [settings | keys]}).stages[0]
        assert isinstance(made, Pretrain)
        return made

    return make


def prepare(stage: Pretrain, folder: Path, held_out: HeldOut | None = None) -> tuple[Prepared, list[str]]:
    said: list[str] = []
    return prepare_pretrain(stage, folder, seed=3, held_out=held_out or HeldOut(), say=said.append), said


@pytest.fixture
def train(stage: Callable[..., Pretrain], meter: Meter, tmp_path: Path) -> Train:
    """A function that trains: gives the model and the metrics. `stop_at` cuts the power after that step's
    metrics."""

    def run(name: str = "run", stop_at: int | None = None, **keys: Any) -> tuple[Model, list[dict[str, Any]]]:
        made, folder = stage(**keys), tmp_path / name
        material, _ = prepare(made, folder)
        model = Model(material.start)

        def watch(line: dict[str, Any]) -> None:
            if line["step"] == stop_at:
                raise KeyboardInterrupt

        train_pretrain(
            made,
            material,
            model,
            folder,
            seed=3,
            meter=meter,
            ranks=Alone("cpu"),
            progress=Progress(watch, watch),
        )
        return model, [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]

    return run


SETTINGS: dict[str, dict[str, Any]] = {
    "llama": {"family": "llama"},
    "moe, muon": {"family": "moe", "optimizer": "muon", "cross_document": False},
    "deepseek, further tokens, holes": {"mtp_depth": 1, "fim_rate": 0.5},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_stage_that_died_ends_with_the_same_weights(train: Train, name: str) -> None:
    settings = SETTINGS[name]
    whole, metrics = train("whole", **settings)
    for stop_at in (3, 4):  # with step 3 done but not in a checkpoint; right after a checkpoint
        with pytest.raises(KeyboardInterrupt):
            train("died", stop_at=stop_at, **settings)
    died, again = train("died", **settings)
    for (key, one), two in zip(whole.decoder.named_parameters(), died.decoder.parameters(), strict=True):
        assert torch.equal(one, two), key
    varying = {"seconds", "seconds_by_activity", "tokens_per_second", "usd_so_far", "cores_had"}
    assert [{k: v for k, v in line.items() if k not in varying} for line in again] == [
        {k: v for k, v in line.items() if k not in varying} for line in metrics
    ]
    assert [line["step"] for line in metrics] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in metrics if "val_bits_per_byte" in line] == [3, 6]
    assert metrics[-1]["tokens"] == metrics[-1]["cursor"] == 768
    biases = [router.bias for router in routers(whole.decoder) if router.bias is not None]
    assert bool(biases) == (settings.get("family") != "llama")
    assert all(bias.abs().max() > 0 for bias in biases)
    assert ("load_worst" in metrics[0]) == bool(biases)
    assert ("mtp_loss" in metrics[0]) == ("mtp_depth" in settings)


def test_it_learns_and_the_validation_shows_it(train: Train) -> None:
    _, metrics = train(tokens=20_000, batch_tokens=512, validate_every=5)
    bits = [line["val_bits_per_byte"] for line in metrics if "val_bits_per_byte" in line]
    assert metrics[-1]["loss"] < 0.6 * metrics[0]["loss"]
    assert bits[-1] < 0.8 * bits[0]


def test_further_tokens_count_a_third_towards_the_end(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    weights: list[float] = []
    import farthing.train.lm as module

    real = module.lm_step

    def watched(*args: Any, mtp_weight: float, **more: Any) -> Any:
        weights.append(mtp_weight)
        return real(*args, mtp_weight=mtp_weight, **more)

    monkeypatch.setattr(module, "lm_step", watched)
    train(mtp_depth=1, mtp_weight=0.6)
    assert weights == pytest.approx([0.6] * 4 + [0.2] * 2)


# ---- what is prepared ----


def test_the_documents_are_split_and_the_start_is_a_model_folder(
    stage: Callable[..., Pretrain], text: Path, tmp_path: Path
) -> None:
    material, said = prepare(stage(mtp_depth=1), tmp_path)
    assert said == []
    assert material.train.documents + material.validation.documents == 300
    assert 15 < material.validation.documents < 50
    tokenizer = Tokenizer(material.start)
    assert len(tokenizer) == 280
    apart = {
        tokenizer.decode(material.validation.document(n).tolist())
        for n in range(material.validation.documents)
    }
    every = [json.loads(line)["text"] for line in text.read_text().splitlines()]
    assert apart == {document for document in every if is_validation(document, 0.1)}
    model = Model(material.start)
    assert model.hf_config["model_type"] == "deepseek_v3"
    assert model.hf_config["num_nextn_predict_layers"] == 1
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    prepare(stage(mtp_depth=1), tmp_path)  # nothing is made twice
    assert stamps == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


def test_worked_solutions_leave_out_what_is_held_out(stage: Callable[..., Pretrain], tmp_path: Path) -> None:
    held_out = {question_key(item.question) for item in Mixture(SUMS, 3).held_out(80)}
    source = {"tasks": SUMS, "items": 150}
    prepare(stage(data=[source], validation=0.2, vocab_size=270), tmp_path, HeldOut(held_out))
    lines = [json.loads(line) for line in (tmp_path / "data" / "lessons-1.jsonl").read_text().splitlines()]
    assert len(lines) == 150
    assert not {question_key(line["question"]) for line in lines} & held_out
    assert all(line["question"] in line["text"] for line in lines)


@pytest.mark.parametrize("weight", [0.25, 1.0, 2.0, 2.5])
def test_a_weight_is_how_often_a_document_is_copies(weight: float) -> None:
    times = [copies(number, weight) for number in range(40)]
    assert sum(times) == 40 * weight
    assert max(times) - min(times) <= 1


def test_weights_and_a_validation_path(stage: Callable[..., Pretrain], text: Path, tmp_path: Path) -> None:
    (tmp_path / "apart.txt").write_text("one two three four")
    twice = stage(data=[{"path": str(text), "weight": 2}], validation=str(tmp_path / "apart.txt"))
    material, _ = prepare(twice, tmp_path / "run")
    assert (material.train.documents, material.validation.documents) == (600, 1)


def test_documents_of_a_validation_path_never_train(
    stage: Callable[..., Pretrain], text: Path, tmp_path: Path
) -> None:
    (tmp_path / "apart.jsonl").write_text("".join(line + "\n" for line in text.read_text().splitlines()[:7]))
    material, _ = prepare(stage(validation=str(tmp_path / "apart.jsonl")), tmp_path / "run")
    assert (material.train.documents, material.validation.documents) == (293, 7)


def test_near_copies_of_validation_documents_and_held_out_questions_never_train(
    stage: Callable[..., Pretrain], text: Path, tmp_path: Path
) -> None:
    apart = " ".join(f"word{n} of {n * n % 97} things" for n in range(60))
    rows = [
        apart.replace("word9 ", "other ").upper(),
        f"Notes of the day. What is 12\u2212-30? No, what is\u00a012 + 30? {'So it goes. ' * 9}",
        "What is 12 + 31? And what is 12 + 30 + 5?",
        "word1 of 1 things and word2 of 4 things",
    ]
    (tmp_path / "apart.jsonl").write_text(json.dumps({"text": apart}) + "\n")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    data = [str(text), {"path": str(tmp_path / "rows.jsonl"), "weight": 2}]
    made = stage(data=data, validation=str(tmp_path / "apart.jsonl"))
    material, said = prepare(made, tmp_path / "run", HeldOut(["What is 12 + 30?"]))
    assert (material.train.documents, material.validation.documents) == (304, 1)
    assert said == [
        "rows.jsonl:1: it is a validation document, or nearly; left out",
        'rows.jsonl:2: it holds a held-out question ("What is 12 + 30?"); left out',
    ]
    counts = {"it is a validation document, or nearly": 1, "it holds a held-out question": 1}
    assert json.loads((tmp_path / "run" / "data" / "left-out.json").read_text()) == counts


def test_near_copies_of_a_validation_share_never_train(
    stage: Callable[..., Pretrain], tmp_path: Path
) -> None:
    texts = [f"{n} " + " ".join(f"w{(n * k) % 211}x{n}" for k in range(1, 40)) for n in range(120)]
    rows = [*texts, *(f"{text.upper()} Read more." for text in texts)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    made = stage(data=[str(tmp_path / "rows.jsonl")], validation=0.1, vocab_size=270)
    material, said = prepare(made, tmp_path / "run")
    kept = [number % 120 for number, row in enumerate(rows) if is_validation(row, 0.1)]
    assert material.validation.documents == len(kept)
    assert material.train.documents == 2 * (120 - len(set(kept)))
    assert "it is a validation document, or nearly" in said[0]


def test_a_given_tokenizer_is_copies(
    stage: Callable[..., Pretrain], tiny_model: Path, tmp_path: Path
) -> None:
    material, _ = prepare(stage(tokenizer=str(tiny_model)), tmp_path)
    assert (material.start / "tokenizer.json").read_bytes() == (tiny_model / "tokenizer.json").read_bytes()
    assert material.dialled.config["vocab_size"] == 304
    assert not (tmp_path / "data" / "tokenizer").exists()


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"data": ["missing.jsonl"]}, "missing.jsonl does not exist"),
        ({"validation": 1e-9}, "validation: a share of 1e-09 falls on none of the documents"),
        ({"vocab_size": 5000}, "vocab_size 5000 exceeds the words of the text"),
        ({"data": [{"tasks": {"maze": 1}, "items": 5}]}, "data: maze has no worked solutions; those that have are"),
        ({"model": {"max_position_embeddings": 16}}, "length (32) is more than max_position_embeddings (16)"),
        ({"model": {"num_attention_heads": 4, "n_group": 4, "n_routed_experts": 4}}, "n_group"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_on_is_said_in_a_sentence(
    stage: Callable[..., Pretrain], tmp_path: Path, keys: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError) as caught:
        prepare(stage(**keys), tmp_path)
    assert said in str(caught.value)


def test_a_broken_row_stops_or_is_said_once(stage: Callable[..., Pretrain], tmp_path: Path) -> None:
    rows = [json.dumps({"text": f"{n} one two three four five"}) for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join([*rows[:7], "{broken", *rows[7:]]))
    data = {"data": [str(tmp_path / "rows.jsonl")], "vocab_size": 270}
    with pytest.raises(UserError, match=r"rows\.jsonl:8: the line is not JSON"):
        prepare(stage(**data), tmp_path / "stop")
    _, said = prepare(stage(policy="skip", **data), tmp_path / "skip")
    assert len(said) == 1
    assert said[0].startswith("rows.jsonl:8: the line is not JSON")


def test_many_broken_rows_are_a_count_and_a_file_whichever_pass_meets_them(
    stage: Callable[..., Pretrain], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "farthing.stages.pretrain.TOKENIZER_CHARACTERS", 500
    )  # the tokenizer reads no broken row
    rows = [json.dumps({"text": f"{n} one two three four five"}) for n in range(60)]
    (tmp_path / "rows.jsonl").write_text("\n".join([*rows, *["{broken"] * 30]))
    data = {"data": [str(tmp_path / "rows.jsonl")], "vocab_size": 265, "policy": "skip"}
    _, said = prepare(stage(**data), tmp_path / "stage")
    assert said[0].startswith("30 rows left out (30: the line is not JSON)")
    assert len(said) == 4
    assert len((tmp_path / "stage" / "data" / "left-out.txt").read_text().splitlines()) == 30
    _, again = prepare(stage(**data), tmp_path / "stage")
    assert again == []  # prepared already


def test_an_error_comes_after_what_led_to_it(stage: Callable[..., Pretrain], tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{broken\n" * 30)
    said: list[str] = []
    with pytest.raises(UserError):
        prepare_pretrain(
            stage(data=[str(tmp_path / "rows.jsonl")], vocab_size=270, policy="skip"),
            tmp_path / "stage", seed=3, held_out=HeldOut(), say=said.append,
        )  # fmt: skip
    assert said[0].startswith("30 rows left out")
