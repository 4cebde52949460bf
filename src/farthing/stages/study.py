"""A study: many small pretrainings on the same text in the same order, to be compared with each other.

    data/                     tokenizer and text, prepared once for all (as in a pretrain stage)
    data/scored               the slice of the validation documents that every run is scored on
    runs/FAMILY-OPTIMIZER-N/  one training: metrics.jsonl, and done.json when it is finished; the first seed's model

Families take turns within a seed, each seed beginning with another one, so that a disturbance of the machine or its
warming up does not fall on one family alone. A finished run is not done again, an interrupted one continues.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from farthing.base.device import Place
from farthing.base.errors import UserError
from farthing.cost.flops import parameters
from farthing.cost.memory import cache_bytes_per_token
from farthing.cost.meter import Meter
from farthing.data.corpus import Corpus
from farthing.data.packing import Packer
from farthing.data.text import Document
from farthing.data.tokenizer import Tokenizer
from farthing.engine import Model, at_place
from farthing.recipe import Source, Study
from farthing.stages.pretrain import Material, corpus_of, tokenizer_of, train_pretrain, write_start
from farthing.stages.sources import (
    Say,
    kept_apart,
    quiet,
    source_paths,
    training_documents,
    validation_documents,
)
from farthing.stages.variants import Variant, active_parameters, variants
from farthing.train.lm import bits_per_byte, lm_step
from farthing.train.loop import tokens_per_pass

PASSAGE = 32  # characters a token of a row's length: about ten rows of English
PARTS = 8  # documents at least that a slice is of, if there are as many


@dataclass(frozen=True)
class Planned:
    """One training of a study: a variant, and its seed by number (from 1) and value."""

    name: str
    variant: Variant
    number: int
    seed: int


@dataclass(frozen=True)
class Prepared:
    """The text of a study, and its trainings in the order they are done."""

    tokenizer: Tokenizer
    train: Corpus
    scored: Corpus
    runs: list[Planned]

    @property
    def steps(self) -> int:
        """Of all trainings together."""
        return sum(run.variant.dialled.steps for run in self.runs)

    def facts(self) -> dict[str, Any]:
        """What done.json says of the data: counts, and hashes of the text."""
        return {
            name: {"documents": c.documents, "tokens": c.tokens, "bytes": c.bytes, "sha256": c.sha256}
            for name, c in (("train", self.train), ("validation", self.scored))
        }


def planned(study: Study, found: list[Variant], seed: int) -> list[Planned]:
    """The trainings in order: seed by seed, optimizer by optimizer, families in turn."""
    runs = []
    for number in range(1, study.seeds + 1):
        for optimizer in study.optimizers:
            mine = [variant for variant in found if variant.optimizer == optimizer]
            turn = (number - 1) % len(mine)
            for variant in mine[turn:] + mine[:turn]:
                name = f"{variant.family}-{optimizer}-{number}"
                runs.append(Planned(name, variant, number, seed + number - 1))
    return runs


def prepare_study(study: Study, folder: Path, *, seed: int, held_out: set[str], say: Say) -> Prepared:
    """Read the data and train the tokenizer, what is there already is taken; decide what will be trained.

    Args:
        held_out: normalised texts of questions that worked solutions must not be of.
        say: told of every document that cannot be used.

    Raises:
        UserError: for data that cannot be read or is too little, a validation without documents, and a size that
            cannot be.
    """
    data = folder / "data"
    paths = source_paths(study.data, data, seed, held_out)
    share = study.validation if isinstance(study.validation, float) else 0.0
    tell = say if not (data / "train").exists() else quiet
    told = (data / "tokenizer").exists()

    elsewhere = kept_apart(study.validation, study.data[0].field, study.policy)

    def training(tell: Say) -> Iterator[Document]:
        return training_documents(paths, share, study.policy, tell, elsewhere)

    stage = variants(study, study.vocab_size)[0].stage  # before the text is read: a size that cannot be
    tokenizer = tokenizer_of(stage, data / "tokenizer", lambda: training(tell))
    cut = PASSAGE * study.length
    train = corpus_of(lambda: passages(training(tell if told else quiet), cut), tokenizer, data / "train")
    if isinstance(study.validation, str):
        source = Source(path=study.validation, field=study.data[0].field)
        apart = training_documents([(source, study.validation)], 0.0, study.policy, tell)
    else:
        apart = validation_documents(paths, share, study.policy, quiet)
    scored = _scored(apart, study, tokenizer, data / "scored")
    found = variants(study, len(tokenizer), tokenizer.bos_id, tokenizer.eos_id)
    return Prepared(tokenizer, train, scored, planned(study, found, seed))


def train_study(
    prepared: Prepared,
    folder: Path,
    *,
    at: Place,
    meter: Meter,
    on_metrics: Callable[[dict[str, Any]], None],
    say: Say,
) -> None:
    """Do every training that is not done. `on_metrics` gets every step's metrics, its `step` counted through all.

    Raises:
        Diverged: when a gradient says that training is broken.
    """
    before = 0
    for number, run in enumerate(prepared.runs, 1):
        place = folder / "runs" / run.name
        if not (place / "done.json").exists():
            say(f"{number} of {len(prepared.runs)}: {run.name}")

            def show(line: dict[str, Any], before: int = before) -> None:
                on_metrics(line | {"step": before + line["step"]})

            _train(run, prepared, place, at, meter, show)
        for name in ("start", "state"):  # of no more use, and large
            shutil.rmtree(place / name, ignore_errors=True)
        before += run.variant.dialled.steps


def slices(documents: Iterable[Document], characters: int) -> Iterator[Document]:
    """About `characters` of text: from each document at most an eighth of that, from its middle."""
    left, most = characters, max(1, characters // PARTS)
    for document in documents:
        if left <= 0:
            return
        length = min(len(document.text), most, left)
        start = (len(document.text) - length) // 2
        text = document.text[start : start + length]
        if text.strip():
            left -= length
            yield Document(text, document.place)


def passages(documents: Iterable[Document], characters: int) -> Iterator[Document]:
    """The documents cut in passages of about so many characters, half as many more at most, at the end of a line where
    there is one. A short run over whole books would read three of them, and differ from another seed by which."""
    for document in documents:
        text, start = document.text, 0
        while start < len(text):
            stop = len(text)
            if stop - start > 1.5 * characters:
                line = text.rfind("\n", start + characters // 2, start + characters)
                stop = start + characters if line < 0 else line + 1
            if text[start:stop].strip():
                yield Document(text[start:stop], document.place)
            start = stop


def _scored(documents: Iterable[Document], study: Study, tokenizer: Tokenizer, folder: Path) -> Corpus:
    if folder.exists():
        return Corpus.open(folder)
    found = list(slices(documents, study.validate_on))
    if not found:
        raise UserError(
            f"validation: {study.validation} falls on none of the documents; raise it, or give a path of its own"
        )
    return corpus_of(lambda: iter(found), tokenizer, folder)


def _train(
    run: Planned,
    prepared: Prepared,
    place: Path,
    at: Place,
    meter: Meter,
    on_metrics: Callable[[dict[str, Any]], None],
) -> None:
    variant, dialled = run.variant, run.variant.dialled
    with meter.span("load"):
        write_start(dialled, place / "start", prepared.tokenizer, run.seed)
        model = at_place(place / "start", at)
        at_once = _rehearse(model, run, prepared)
    with meter.span("evaluate") as span:  # where the curve begins
        length = variant.stage.length
        found = bits_per_byte(model.decoder, prepared.scored, length, at_once, model.hf_config)
        untrained, span.tokens_in, span.flops = found
    material = Material(place / "start", prepared.train, prepared.scored, dialled)
    train_pretrain(variant.stage, material, model, place, seed=run.seed, meter=meter, on_metrics=on_metrics)
    with meter.span("checkpoint"):
        if run.number == 1:
            model.save(place / "model")
        counted = parameters(dialled.config)
        facts = {
            "family": variant.family,
            "optimizer": variant.optimizer,
            "number": run.number,
            "seed": run.seed,
            "lr": dialled.lr,
            "batch_tokens": dialled.batch_tokens,
            "warmup": dialled.warmup,
            "parameters": counted.total,
            "parameters_mtp": counted.mtp,
            "active": active_parameters(dialled.config),
            "layers": dialled.config["num_hidden_layers"],
            "width": dialled.config["hidden_size"],
            "cache_bytes_per_token": cache_bytes_per_token(dialled.config),
            "untrained_bits_per_byte": untrained,
            "load_average": round(os.getloadavg()[0], 2),
        }
        partial = place / ".done.json.partial"
        partial.write_text(json.dumps(facts, indent=1) + "\n")
        partial.replace(place / "done.json")


def _rehearse(model: Model, run: Planned, prepared: Prepared) -> int:
    """One forward and backward pass that teaches nothing: what a kernel does once should not be on a run's clock.
    Gives how many tokens go through at once."""
    stage, decoder = run.variant.stage, model.decoder
    packer = Packer(prepared.train, stage.length, run.seed, cross_document=stage.cross_document)
    batch, _ = packer.batch(0, run.variant.dialled.batch_tokens // stage.length)
    at_once = tokens_per_pass(decoder.config, stage.memory_gb, decoder.embed.weight.element_size())
    lm_step(decoder, batch, model.hf_config, at_once, mtp_weight=stage.mtp_weight, balance=stage.balance)
    for parameter in decoder.parameters():
        parameter.grad = None
    return at_once
