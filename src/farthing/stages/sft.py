"""Supervised fine-tuning: a model learns to answer as the assistant does in given conversations.

As DeepSeek-V3 was (arXiv:2412.19437, section 5.1): conversations are packed into rows without seeing each other,
and only the assistant's words, with the token that ends its turn, have a loss.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from farthing.base.device import Ranks
from farthing.base.errors import UserError
from farthing.base.figures import plural
from farthing.base.files import read_json, write_json
from farthing.cost.meter import Meter
from farthing.data.conversations import ConversationPacker, examples
from farthing.data.left_out import LEFT_OUT, LeftOut
from farthing.data.masking import Example
from farthing.data.messages import Conversation, Passage
from farthing.data.overlap import HeldOut
from farthing.data.packing import PackedBatch
from farthing.data.shapes import Found, placed_conversations
from farthing.data.text import Problems
from farthing.data.tokenizer import Tokenizer
from farthing.data.words import question_key
from farthing.engine import Model
from farthing.recipe import Asks, Sft, Source
from farthing.stages.at import At, Say
from farthing.stages.pieces import Pieces
from farthing.stages.sources import copies, is_validation, source_paths
from farthing.train.lm import train_lm
from farthing.train.loop import Progress
from farthing.train.optim import add_lora

FEW_STEPS = 20
"""A learning rate that rises and falls within fewer steps than this teaches little."""
_PREPARED = "examples.json"


@dataclass(frozen=True)
class Prepared:
    """The data of a fine-tuning stage."""

    packer: ConversationPacker
    steps: int
    validation: PackedBatch | None
    facts: dict[str, dict[str, Any]]
    """Counts and a hash of the examples, by part, for done.json."""


def run(spec: Sft, start: Path | None, at: At) -> Path:
    """As `stages.Kind.run`."""
    assert start is not None
    model = at.load(start, spec.chat_template)
    with at.meter.span("load"), at.waiting("rendering the conversations"):
        prepared = prepare_sft(
            spec,
            model.tokenizer,
            at.folder,
            seed=at.seed,
            asks=at.asks,
            held_out=at.held_out,
            say=at.warn,
        )
    at.say(
        f"{at.folder.name}: {plural(len(prepared.packer.examples), 'example')}, {plural(prepared.steps, 'step')}"
    )
    with at.progress(prepared.steps, model) as progress:
        train_sft(
            spec,
            prepared,
            model,
            at.folder,
            seed=at.seed,
            meter=at.meter,
            ranks=at.ranks,
            progress=progress,
        )
    return at.finish(model, prepared.steps, start=start, merged=bool(spec.lora), data=prepared.facts)


def prepare_sft(
    stage: Sft,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    seed: int,
    asks: Asks,
    held_out: HeldOut,
    say: Say,
) -> Prepared:
    """Pack the conversations, and count the steps.

    Args:
        asks: how the recipe asks its questions; worked solutions use the same words.
        held_out: questions; a conversation in which anyone says one, however wrapped, is left out.
        say: called with the number of conversations that cannot be used, and three of them.

    Raises:
        UserError: for a conversation that cannot be used, under `policy: stop`, when none is left, and for data that
            have changed since the stage was begun.
    """
    paths = source_paths(stage.data, Pieces(folder, say, seed), seed, held_out, asks)
    found, kept = Found(), _Kept(stage.validation if isinstance(stage.validation, float) else 0.0)
    with LeftOut(folder / LEFT_OUT, say) as left_out:
        problems = Problems(stage.policy, left_out)
        if isinstance(stage.validation, str):
            kept.keep(placed_conversations(stage.validation, problems, found=found))
        train = _conversations(paths, held_out, problems, found, kept)
        made = examples(tokenizer, train, stage.length, problems)
        if stage.validation is not None:
            validation = _validation(stage, tokenizer, kept, problems)
    for line in found.lines():
        say(line)
    parts = {"train": made} | ({"validation": validation} if stage.validation is not None else {})
    facts = {name: _facts(part) for name, part in parts.items()}
    _same_as_before(folder, facts)
    packer = ConversationPacker(made, stage.length, seed)
    rows = stage.batch_tokens // stage.length
    steps = stage.steps or math.ceil(stage.epochs * packer.rows_per_epoch / rows)
    if steps < FEW_STEPS and stage.steps is None:
        say(_few(stage, packer, steps))
    return Prepared(packer, steps, _one_pass(validation, stage.length) if stage.validation else None, facts)


class _Kept:
    """The conversations kept for validation, and what may therefore not be trained on.

    Args:
        share: of the conversations, kept by what they ask first, however it is spelt.
    """

    def __init__(self, share: float) -> None:
        self.share = share
        self.conversations: list[tuple[Conversation | Passage, str]] = []
        self._asked = HeldOut()

    def keep(self, placed: Iterable[tuple[Conversation | Passage, str]]) -> None:
        """Keep all of them, and whatever asks the same."""
        self.conversations += placed
        self._asked = HeldOut(dict.fromkeys(conversation.asked[0] for conversation, _ in self.conversations))

    def takes(self, conversation: Conversation | Passage, place: str) -> bool:
        """Whether the conversation may not be trained on; one that belongs to the share is kept."""
        asked = conversation.asked[0]
        if is_validation(question_key(asked), self.share):
            self.conversations.append((conversation, place))
            return True
        return self._asked.holds(asked)


def _validation(stage: Sft, tokenizer: Tokenizer, kept: _Kept, problems: Problems) -> list[Example]:
    if not kept.conversations:
        raise UserError(
            f"validation: a share of {stage.validation:g} falls on none of the conversations; raise it, or give a path"
            if isinstance(stage.validation, float)
            else f"validation: {stage.validation} holds no conversation"
        )
    return examples(tokenizer, kept.conversations, stage.length, problems)


def _one_pass(made: Sequence[Example], length: int) -> PackedBatch:
    packer = ConversationPacker(made, length, seed=0)
    return packer.batch(0, packer.rows_per_epoch)[0]


def _facts(made: Sequence[Example]) -> dict[str, Any]:
    hashed = hashlib.sha256()
    for example in made:
        hashed.update(len(example.ids).to_bytes(8, "little") + example.ids.tobytes() + example.loss.tobytes())
    return {
        "examples": len(made),
        "tokens": sum(len(example.ids) for example in made),
        "learnt": sum(int(example.loss.sum()) for example in made),
        "sha256": hashed.hexdigest(),
    }


def _same_as_before(folder: Path, facts: dict[str, dict[str, Any]]) -> None:
    """Record the examples; once training has begun they must stay the same, also those that come from a hub."""
    path = folder / "data" / _PREPARED
    begun = (folder / "state").is_dir() and any((folder / "state").iterdir())
    if begun and path.is_file() and read_json(path, f"delete {folder} to begin the stage again") != facts:
        raise UserError(
            f"the conversations, or how the model's template renders them, have changed since {folder} was begun; put "
            "them back, or give another --run-dir"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, facts)


def _few(stage: Sft, packer: ConversationPacker, steps: int) -> str:
    """What to do about so few steps."""
    rows = packer.rows_per_epoch
    found = (
        f"the data fill {plural(rows, 'row')} of {stage.length:,} tokens, which gives {plural(steps, 'step')}"
    )
    at_once = max(1, int(stage.epochs * rows / FEW_STEPS))
    remedy = (
        [f"batch_tokens: {at_once * stage.length}"] if at_once * stage.length < stage.batch_tokens else []
    )
    if stage.epochs * rows / at_once < FEW_STEPS:
        remedy.append(f"epochs: {math.ceil(FEW_STEPS * at_once / rows)}")
    return f"{found}, too few to learn much; set {' and '.join(remedy)} for {FEW_STEPS} or more"


def _conversations(
    paths: Sequence[tuple[Source, str]], held_out: HeldOut, problems: Problems, found: Found, kept: _Kept
) -> Iterator[tuple[Conversation | Passage, str]]:
    for source, path in paths:
        seen = found if source.path else Found()  # what worked solutions have besides is our own
        for number, (conversation, place) in enumerate(
            placed_conversations(path, problems, field=source.field, shape=source.shape, found=seen)
        ):
            said = dict.fromkeys((*conversation.asked, *conversation.texts)) if held_out else ()
            if overlap := next(filter(None, map(held_out.match, said)), None):
                problems.leave_out(place, overlap.sentence)
            elif not kept.takes(conversation, place):
                yield from itertools.repeat((conversation, place), copies(number, source.weight))


def train_sft(
    stage: Sft,
    prepared: Prepared,
    model: Model,
    folder: Path,
    *,
    seed: int,
    meter: Meter,
    ranks: Ranks,
    progress: Progress,
) -> None:
    """Train `model` in place; metrics and checkpoints go to `folder`.

    Raises:
        Diverged: when the gradient says that training is broken.
    """
    if stage.lora:
        add_lora(model.decoder, stage.lora, stage.lora_alpha, seed)
    rows = stage.batch_tokens // stage.length
    train_lm(
        stage,
        model.decoder,
        model.hf_config,
        folder,
        steps=prepared.steps,
        lr=stage.lr,
        warmup=min(stage.warmup, prepared.steps),
        mtp_weight=lambda _: stage.mtp_weight,
        next_batch=lambda cursor: prepared.packer.batch(cursor, rows),
        validation=prepared.validation,
        validate_every=stage.validate_every,
        meter=meter,
        ranks=ranks,
        progress=progress,
    )
