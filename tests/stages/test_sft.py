"""The fine-tuning stage: what is learnt, what is left out, and that dying changes nothing."""

import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from farthing.base.device import Alone
from farthing.base.errors import UserError
from farthing.cost.meter import Meter
from farthing.data.chat_templates import template_text
from farthing.data.overlap import HeldOut
from farthing.data.packing import NO_LOSS, PackedBatch
from farthing.data.tokenizer import Tokenizer
from farthing.engine import Model
from farthing.recipe import Asks, Sft, TaskSetting, validate
from farthing.stages.sft import prepare_sft, train_sft
from farthing.train.loop import Progress

SUMS = {"chain_sum": {"config": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}}}
ASKS = Asks({"chain_sum": TaskSetting()}, "tag", "Please: {question}", None, 50)


KEYS: list[dict[str, Any]] = [{}, {"optimizer": "muon"}, {"lora": 4}]


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    draw = random.Random(1)
    lines = []
    for _ in range(60):
        a, b = draw.randrange(10), draw.randrange(10)
        turns = [{"role": "user", "content": f"{a} + {b}"}, {"role": "assistant", "content": f"{a + b}"}]
        lines.append({"messages": turns * draw.randint(1, 2)})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def stage(chats: Path) -> Callable[..., Sft]:
    def make(**keys: Any) -> Sft:
        settings = {
            "kind": "sft", "data": [str(chats)], "length": 64, "batch_tokens": 256, "steps": 6, "lr": 2e-3,
            "checkpoint_every": 2,
        }  # fmt: skip
        made = validate({"name": "t", "base": "b", "stages": [settings | keys]}).stages[0]
        assert isinstance(made, Sft)
        return made

    return make


def prepare(made: Sft, folder: Path, model: Path, held_out: HeldOut | None = None) -> Any:
    said: list[str] = []
    prepared = prepare_sft(
        made, Tokenizer(model), folder, seed=3, asks=ASKS, held_out=held_out or HeldOut(), say=said.append
    )
    return prepared.packer, prepared.steps, said


@pytest.fixture
def train(stage: Callable[..., Sft], tiny_model: Path, meter: Meter, tmp_path: Path) -> Callable[..., Any]:
    def run(name: str = "run", stop_at: int | None = None, **keys: Any) -> tuple[Model, list[dict[str, Any]]]:
        made, folder, model = stage(**keys), tmp_path / name, Model(tiny_model)
        prepared = prepare_sft(
            made, model.tokenizer, folder, seed=3, asks=ASKS, held_out=HeldOut(), say=lambda _: None
        )

        def watch(line: dict[str, Any]) -> None:
            if line["step"] == stop_at:
                raise KeyboardInterrupt

        train_sft(
            made,
            prepared,
            model,
            folder,
            seed=3,
            meter=meter,
            ranks=Alone("cpu"),
            progress=Progress(watch, watch),
        )
        return model, [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]

    return run


@pytest.mark.parametrize("keys", KEYS, ids=["adamw", "muon", "lora"])
def test_a_conversation_is_learnt(train: Callable[..., Any], tmp_path: Path, keys: dict[str, Any]) -> None:
    turns = [{"role": "user", "content": "1 + 1"}, {"role": "assistant", "content": "7777"}]
    (tmp_path / "odd.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    _, metrics = train("odd", data=[str(tmp_path / "odd.jsonl")], steps=12, **keys)
    assert metrics[-1]["loss"] < 0.8 * metrics[0]["loss"]


@pytest.mark.parametrize("keys", KEYS, ids=["adamw", "muon", "lora"])
def test_a_stage_that_died_ends_with_the_same_weights(
    train: Callable[..., Any], keys: dict[str, Any]
) -> None:
    whole, metrics = train("whole", **keys)
    for stop_at in (3, 4):
        with pytest.raises(KeyboardInterrupt):
            train("died", stop_at=stop_at, **keys)
    died, again = train("died", **keys)
    for (key, one), two in zip(whole.decoder.named_parameters(), died.decoder.parameters(), strict=True):
        assert torch.equal(one, two), key
    same = ("step", "loss", "tokens", "lr", "grad_norm", "cursor")
    assert [[line[k] for k in same] for line in again] == [[line[k] for k in same] for line in metrics]
    if "lora" in keys:
        assert all(not p.requires_grad for n, p in whole.decoder.named_parameters() if ".lora." not in n)


def test_the_assistants_words_and_the_end_of_its_turn_are_learnt_and_nothing_else(
    stage: Callable[..., Sft], tiny_model: Path, tmp_path: Path
) -> None:
    packer, _, _ = prepare(stage(), tmp_path, tiny_model)
    tokenizer = Tokenizer(tiny_model)
    batch, _ = packer.batch(0, 3)
    start = 0
    for length in batch.segments:
        ids = batch.ids_N[start : start + length].tolist()
        targets = batch.targets_N[start : start + length].tolist()
        learnt = [target for target in targets if target != NO_LOSS]
        text = tokenizer._tokens.decode(ids, skip_special_tokens=False)
        answers = [part.split("<|end|>")[0] for part in text.split("<|assistant|>")[1:]]
        assert tokenizer._tokens.decode(learnt, skip_special_tokens=False) == "".join(
            f"{answer}<|end|>" for answer in answers
        )
        start += length


def test_epochs_decide_the_steps_unless_they_are_said(
    stage: Callable[..., Sft], tiny_model: Path, tmp_path: Path
) -> None:
    packer, steps, _ = prepare(stage(steps=None, epochs=3.0), tmp_path, tiny_model)
    assert steps * 4 >= 3 * packer.rows_per_epoch > (steps - 1) * 4
    assert prepare(stage(steps=5), tmp_path, tiny_model)[1] == 5


def test_a_held_out_question_is_left_out(
    stage: Callable[..., Sft], tiny_model: Path, chats: Path, tmp_path: Path
) -> None:
    every = [json.loads(line)["messages"] for line in chats.read_text().splitlines()]
    question = every[0][0]["content"]
    left = [m for m in every if all(turn["content"] != question for turn in m)]
    assert 0 < len(left) < len(every)
    packer, _, said = prepare(stage(), tmp_path, tiny_model, HeldOut([question]))
    assert len(packer.examples) == len(left)
    assert f'{chats.name}:1: it is a held-out question ("{question}"); left out' in said


@pytest.mark.parametrize(
    "turns",
    [
        ["What is 12 + 30? Think step by step.", "42"],
        ["Calculate **12 + 30**.", "42"],
        ["Make up an exercise.", "Gladly: what is 12 + 30?"],
        ["Hello!", "Hello.", "### Task 3\nWhat is 12 \u2212 -30? No: what is 12\u00a0+ 30?", "42"],
    ],
)
def test_a_wrapped_question_is_left_out_whoever_says_it(
    stage: Callable[..., Sft], tiny_model: Path, tmp_path: Path, turns: list[str]
) -> None:
    other = [
        ["What is 12 + 31?", "43"],
        ["What is 12 + 30 + 5?", "47"],
        ["Is 12 a number?", "Yes, as is 30."],
    ]
    rows = [
        {"messages": [{"role": ("user", "assistant")[n % 2], "content": c} for n, c in enumerate(turn)]}
        for turn in [*other, turns]
    ]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    packer, _, said = prepare(
        stage(data=[{"path": str(path)}]), tmp_path, tiny_model, HeldOut(["What is 12 + 30?"])
    )
    assert len(packer.examples) == 3
    (line,) = (line for line in said if 'held-out question ("What is 12 + 30?"); left out' in line)
    assert line.startswith("chats.jsonl:4")


def test_worked_solutions_are_asked_and_answered_as_the_recipe_does(
    stage: Callable[..., Sft], tiny_model: Path, tmp_path: Path
) -> None:
    data = [{"tasks": SUMS, "items": 30, "weight": 2}]
    packer, _, _ = prepare(stage(data=data, length=256), tmp_path, tiny_model)
    assert len(packer.examples) == 60
    path = tmp_path / "data" / "lessons-1.jsonl"
    for line in map(json.loads, path.read_text().splitlines()):
        asked, answered = line["messages"]
        assert asked == {"role": "user", "content": f"Please: {line['question']}"}
        assert answered["content"].startswith("<think>")
        assert answered["content"].endswith("</answer>")


def test_conversations_that_cannot_be_used_are_said(
    stage: Callable[..., Sft], tiny_model: Path, tmp_path: Path
) -> None:
    long = [{"role": "user", "content": "1 " * 90}, {"role": "assistant", "content": "2"}]
    good = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
    rows = [{"messages": long}, {"messages": good}, {"messages": good[:1]}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"data": [str(tmp_path / "rows.jsonl")]}
    with pytest.raises(UserError, match=r"rows\.jsonl:3: the conversation does not end with the assistant"):
        prepare(stage(**data), tmp_path / "stop", tiny_model)
    packer, _, said = prepare(stage(policy="skip", **data), tmp_path / "skip", tiny_model)
    assert len(packer.examples) == 1
    assert len(said) == 2


def with_template(model: Path, folder: Path, cut: Callable[[str], str]) -> Path:
    """A copy of the model whose template is changed."""
    shutil.copytree(model, folder)
    template = (folder / "chat_template.jinja").read_text()
    assert cut(template) != template
    (folder / "chat_template.jinja").write_text(cut(template))
    return folder


def test_a_template_that_cannot_show_reasoning_is_refused_with_the_turn(
    stage: Callable[..., Sft], tiny_model: Path, tmp_path: Path
) -> None:
    folder = with_template(
        tiny_model,
        tmp_path / "model",
        lambda text: text.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}"),
    )
    assert len(prepare(stage(), tmp_path / "plain", folder)[0].examples) == 60
    thought = {"role": "assistant", "reasoning_content": "1", "content": "2"}
    row = {"messages": [{"role": "user", "content": "1 + 1"}, thought]}
    (tmp_path / "thought.jsonl").write_text(json.dumps(row))
    with pytest.raises(
        UserError, match=r"^thought\.jsonl:1: the chat template leaves out the reasoning of message 2"
    ):
        prepare(stage(data=[str(tmp_path / "thought.jsonl")]), tmp_path / "thought", folder)


@pytest.fixture
def flood(tmp_path: Path) -> dict[str, list[str]]:
    """100 conversations, of which 28 are too long."""
    long = [{"role": "user", "content": "1 " * 90}, {"role": "assistant", "content": "2"}]
    good = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
    rows = [{"messages": long if number < 28 else good} for number in range(100)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"data": [str(tmp_path / "rows.jsonl")]}


def test_many_that_cannot_be_used_are_a_count_and_a_file(
    stage: Callable[..., Sft], flood: dict[str, list[str]], tiny_model: Path, tmp_path: Path
) -> None:
    packer, _, said = prepare(stage(**flood), tmp_path / "stage", tiny_model)
    assert len(packer.examples) == 72
    listed = tmp_path / "stage" / "data" / "left-out.txt"
    assert said[0].startswith("28 rows left out (28: N tokens are more than a row's N)")
    assert said[0].endswith(f"all are listed in {listed}")
    assert len(said) == 4
    assert len(listed.read_text().splitlines()) == 28


def test_none_left_says_why(
    stage: Callable[..., Sft], flood: dict[str, list[str]], tiny_model: Path, tmp_path: Path
) -> None:
    rows = (tmp_path / "rows.jsonl").read_text().replace("messages", "talk")
    (tmp_path / "rows.jsonl").write_text(rows)
    with pytest.raises(UserError) as error:
        prepare(stage(policy="skip", **flood), tmp_path / "stage", tiny_model)
    assert str(error.value) == (
        "no conversation is left to train on: all 100 were left out, first rows.jsonl:1: the row has no conversation "
        "that is recognised (it has 'talk')"
    )


# ---- another template ----


@pytest.fixture
def base_model(tiny_model: Path, tmp_path: Path) -> Path:
    """The model without its chat template."""
    folder = shutil.copytree(tiny_model, tmp_path / "base")
    (folder / "chat_template.jinja").unlink()
    return folder


def test_a_template_of_ours_trains_a_base_model_and_is_written_with_it(
    stage: Callable[..., Sft], base_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        UserError, match="the model has no chat template, as base models have none; give one with"
    ):
        prepare(stage(), tmp_path / "none", base_model)
    model = Model(base_model)
    model.use_template(template_text("plain", model.tokenizer))
    prepared = prepare_sft(
        stage(),
        model.tokenizer,
        tmp_path / "plain",
        seed=3,
        asks=ASKS,
        held_out=HeldOut(),
        say=lambda _: None,
    )
    assert len(prepared.packer.examples) == 60
    model.save(tmp_path / "saved")
    saved = Tokenizer(tmp_path / "saved")
    asked = [{"role": "user", "content": "1 + 1"}]
    assert saved.render(asked) == model.tokenizer.render(asked) == "User: 1 + 1\n\nAssistant:"
    assert saved.stop_ids == model.tokenizer.stop_ids
    written = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert written["eos_token_id"] == sorted(model.tokenizer.stop_ids)
    assert "chat_template" not in json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())


def test_a_template_is_a_name_or_a_file(stage: Callable[..., Sft], base_model: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="there is no chat template 'chattml'; give chatml or plain, or the path"
    ):
        stage(chat_template="chattml")
    path = tmp_path / "mine.jinja"
    made = stage(chat_template=str(path))
    assert made.paths[-1] == str(path)
    with pytest.raises(UserError, match=r"chat_template: .*mine\.jinja cannot be read"):
        template_text(str(path), Tokenizer(base_model))
    path.write_text("{{ messages[0].content }}")
    assert template_text(str(path), Tokenizer(base_model)) == "{{ messages[0].content }}"


# ---- validation, and how much there is to learn from ----


def texts(tokenizer: Tokenizer, batch: PackedBatch) -> set[str]:
    return {tokenizer.decode(ids.tolist()) for ids in batch.ids_N.split(batch.segments)}


def test_what_is_kept_for_validation_is_never_trained_on(
    stage: Callable[..., Sft], tiny_model: Path, chats: Path, tmp_path: Path
) -> None:
    tokenizer = Tokenizer(tiny_model)

    def parts(name: str, **keys: Any) -> tuple[set[str], set[str]]:
        prepared = prepare_sft(
            stage(**keys),
            tokenizer,
            tmp_path / name,
            seed=3,
            asks=ASKS,
            held_out=HeldOut(),
            say=lambda _: None,
        )
        assert prepared.validation is not None
        whole, _ = prepared.packer.batch(0, prepared.packer.rows_per_epoch)
        return texts(tokenizer, whole), texts(tokenizer, prepared.validation)

    train, kept = parts("share", validation=0.3)
    assert train
    assert kept
    assert {text.split(" + ")[0:2] == [] for text in train} == {False}
    first = {text[:5] for text in kept}
    assert not {text[:5] for text in train} & first, "the same question trains in another conversation"
    assert parts("again", validation=0.3) == (train, kept)
    path = tmp_path / "kept.jsonl"
    path.write_text("".join(chats.read_text().splitlines(keepends=True)[:5]))
    train, kept = parts("path", validation=str(path))
    assert len(kept) <= 5
    assert not train & kept
    with pytest.raises(UserError, match=r"validation: a share of 1e-09 falls on none of the conversations"):
        parts("none", validation=1e-9)


def test_the_loss_of_validation_is_in_the_curve_and_the_same_after_a_restart(
    train: Callable[..., Any],
) -> None:
    keys: dict[str, Any] = {"validation": 0.3, "validate_every": 4}
    _, metrics = train("whole", **keys)
    assert [line["step"] for line in metrics if "val_loss" in line] == [4, 6]
    with pytest.raises(KeyboardInterrupt):
        train("died", stop_at=3, **keys)
    _, again = train("died", **keys)
    assert [line.get("val_loss") for line in again] == [line.get("val_loss") for line in metrics]
    assert {curve.key for curve in Sft.curves} >= {"val_loss"}


def test_validation_changes_no_weight(train: Callable[..., Any], chats: Path, tmp_path: Path) -> None:
    """Without a conversation in common, a path leaves training as it was."""
    path = tmp_path / "others.jsonl"
    turns = [{"role": "user", "content": "99 + 99"}, {"role": "assistant", "content": "198"}]
    path.write_text(json.dumps({"messages": turns}))
    plain, _ = train("plain")
    validated, metrics = train("validated", validation=str(path), validate_every=1)
    assert all("val_loss" in line for line in metrics)
    for one, two in zip(plain.decoder.parameters(), validated.decoder.parameters(), strict=True):
        assert torch.equal(one, two)


def test_data_that_change_under_a_stage_are_refused(
    train: Callable[..., Any], chats: Path, tmp_path: Path
) -> None:
    mine = tmp_path / "mine.jsonl"
    mine.write_text(chats.read_text())
    data = [str(mine)]
    with pytest.raises(KeyboardInterrupt):
        train("run", stop_at=1, data=data)
    mine.write_text("".join(chats.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(KeyboardInterrupt):
        train("run", stop_at=3, data=data)  # nothing depended on them yet
    mine.write_text(chats.read_text())
    with pytest.raises(
        UserError, match=r"the conversations, .*, have changed since .*run was begun; put them back"
    ):
        train("run", data=data)


def test_too_few_steps_are_said_with_the_remedy(
    stage: Callable[..., Sft], tiny_model: Path, tmp_path: Path
) -> None:
    def said(**keys: Any) -> list[str]:
        heard: list[str] = []
        made = stage(steps=None, **keys)
        prepared = prepare_sft(
            made, Tokenizer(tiny_model), tmp_path, seed=3, asks=ASKS, held_out=HeldOut(), say=heard.append
        )
        shutil.rmtree(tmp_path / "data")
        if heard:
            remedy = {k: int(v) for k, v in re.findall(r"(batch_tokens|epochs): (\d+)", heard[-1])}
            assert remedy
            assert said(**keys | remedy) == []
        assert heard or prepared.steps >= 20
        return heard

    [sentence] = said(batch_tokens=1024)
    assert re.fullmatch(
        r"the data fill \d+ rows of 64 tokens, which gives \d+ steps?, too few to learn much; set .* for 20 or more",
        sentence,
    )
    assert said(batch_tokens=64, epochs=0.5) != []
