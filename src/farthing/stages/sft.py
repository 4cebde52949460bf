"""Supervised fine-tuning: a model learns to answer as the assistant does in given conversations.

As DeepSeek-V3 was (arXiv:2412.19437, section 5.1): conversations are packed into rows without seeing each other,
and only the assistant's words, with the token that ends its turn, have a loss.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from farthing.base.device import Ranks
from farthing.cost.meter import Meter
from farthing.data.conversations import ConversationPacker, examples
from farthing.data.left_out import LeftOut
from farthing.data.messages import Conversation, Passage
from farthing.data.overlap import HeldOut
from farthing.data.shapes import Found, placed_conversations
from farthing.data.text import Problems
from farthing.data.tokenizer import Tokenizer
from farthing.engine import Model
from farthing.recipe import Asks, Sft, Source
from farthing.stages.at import At, Say
from farthing.stages.pieces import Pieces
from farthing.stages.sources import LEFT_OUT, copies, source_paths
from farthing.train.lm import train_lm
from farthing.train.loop import Progress
from farthing.train.optim import add_lora


def run(spec: Sft, start: Path | None, at: At) -> Path:
    """As `stages.Kind.run`."""
    assert start is not None
    model = at.load(start)
    with at.meter.span("load"), at.waiting("rendering the conversations"):
        packer, steps = prepare_sft(
            spec,
            model.tokenizer,
            at.folder,
            seed=at.seed,
            asks=at.asks,
            held_out=at.held_out,
            say=at.warn,
        )
    at.say(f"{at.folder.name}: {len(packer.examples):,} conversations, {steps} steps")
    with at.progress(steps) as progress:
        train_sft(
            spec,
            packer,
            steps,
            model,
            at.folder,
            seed=at.seed,
            meter=at.meter,
            ranks=at.ranks,
            progress=progress,
        )
    return at.finish(model, steps, start=start, merged=bool(spec.lora), conversations=len(packer.examples))


def prepare_sft(
    stage: Sft,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    seed: int,
    asks: Asks,
    held_out: HeldOut,
    say: Say,
) -> tuple[ConversationPacker, int]:
    """Pack the conversations, and count the steps.

    Args:
        asks: how the recipe asks its questions; worked solutions use the same words.
        held_out: questions; a conversation in which anyone says one, however wrapped, is left out.
        say: called with the number of conversations that cannot be used, and three of them.

    Raises:
        UserError: for a conversation that cannot be used, under `policy: stop`, and when none is left.
    """
    paths = source_paths(stage.data, Pieces(folder, say), seed, held_out, asks)
    found = Found()
    with LeftOut(folder / LEFT_OUT, say) as left_out:
        problems = Problems(stage.policy, left_out)
        placed = _conversations(paths, held_out, problems, found)
        made = examples(tokenizer, placed, stage.length, problems)
    for line in found.lines():
        say(line)
    packer = ConversationPacker(made, stage.length, seed)
    rows = stage.batch_tokens // stage.length
    return packer, stage.steps or math.ceil(stage.epochs * packer.rows_per_epoch / rows)


def _conversations(
    paths: Sequence[tuple[Source, str]], held_out: HeldOut, problems: Problems, found: Found
) -> Iterator[tuple[Conversation | Passage, str]]:
    for source, path in paths:
        for number, (conversation, place) in enumerate(
            placed_conversations(path, problems, field=source.field, shape=source.shape, found=found)
        ):
            said = (*conversation.asked, *conversation.texts) if held_out else ()
            if overlap := next(filter(None, map(held_out.match, said)), None):
                problems.leave_out(place, overlap.sentence)
            else:
                yield from itertools.repeat((conversation, place), copies(number, source.weight))


def train_sft(
    stage: Sft,
    packer: ConversationPacker,
    steps: int,
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
        steps=steps,
        lr=stage.lr,
        warmup=min(stage.warmup, steps),
        mtp_weight=lambda _: stage.mtp_weight,
        next_batch=lambda cursor: packer.batch(cursor, rows),
        validation=None,
        validate_every=1,
        meter=meter,
        ranks=ranks,
        progress=progress,
    )
