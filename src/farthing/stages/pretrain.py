"""Training from scratch: data, tokenizer and an untrained model first, then tokens.

What is prepared is kept in the stage's folder and made once:

    data/lessons-N.jsonl      worked solutions, where the recipe asks for some
    data/tokenizer/           the tokenizer, if it is trained here
    data/train, validation    the documents as tokens
    start/                    the untrained model, a model folder like any other
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from farthing.base.errors import UserError
from farthing.cost.meter import Meter
from farthing.data.bpe import SPECIAL, train_tokenizer
from farthing.data.corpus import Corpus
from farthing.data.packing import FIM, Packer, fim_marks
from farthing.data.text import Document
from farthing.data.tokenizer import Tokenizer
from farthing.engine import Model
from farthing.model import Decoder
from farthing.recipe import Pretrain, Source
from farthing.recipe.dial import Dialled, dial
from farthing.stages.sources import (
    Say,
    kept_apart,
    quiet,
    source_paths,
    training_documents,
    validation_documents,
)
from farthing.train.lm import train_lm
from farthing.weights import decoder_config, save_decoder
from farthing.weights.sources import model_folder

TOKENIZER_CHARACTERS = 200_000_000  # of the training text, at most, decide the tokenizer
MTP_FULL = 2 / 3  # of the tokens at mtp_weight, the rest at a third of it: V3's 10 of 14.8 T at 0.3, then 0.1


@dataclass(frozen=True)
class Material:
    """What a pretraining stage has prepared."""

    start: Path
    """The untrained model's folder."""
    train: Corpus
    validation: Corpus
    dialled: Dialled

    def facts(self) -> dict[str, Any]:
        """What done.json says of the data: counts, and hashes of the text."""
        return {
            name: {"documents": c.documents, "tokens": c.tokens, "bytes": c.bytes, "sha256": c.sha256}
            for name, c in (("train", self.train), ("validation", self.validation))
        }


def prepare_pretrain(stage: Pretrain, folder: Path, *, seed: int, held_out: set[str], say: Say) -> Material:
    """Read the data, train the tokenizer, and write the untrained model; what is there already is taken.

    Args:
        held_out: normalised texts of questions that worked solutions must not be of.
        say: told of every document that cannot be used.

    Raises:
        UserError: for data that cannot be read or is too little, a validation without documents, a tokenizer
            without an end mark, and a model that cannot be.
    """
    data = folder / "data"
    paths = source_paths(stage.data, data, seed, held_out)
    share = stage.validation if isinstance(stage.validation, float) else 0.0
    tell = say if not (data / "train").exists() else quiet
    elsewhere = kept_apart(stage.validation, stage.data[0].field, stage.policy)

    def training(tell: Say) -> Iterator[Document]:
        return training_documents(paths, share, stage.policy, tell, elsewhere)

    told = (data / "tokenizer").exists() or stage.tokenizer is not None
    tokenizer = tokenizer_of(stage, data / "tokenizer", lambda: training(tell))
    tell = tell if told else quiet
    dialled = dial(stage, len(tokenizer), tokenizer.bos_id, tokenizer.eos_id)

    train = corpus_of(lambda: training(tell), tokenizer, data / "train")
    if isinstance(stage.validation, str):
        apart = [(Source(path=stage.validation, field=stage.data[0].field), stage.validation)]
        validation = corpus_of(
            lambda: (d for d in training_documents(apart, 0.0, stage.policy, say)),
            tokenizer,
            data / "validation",
        )
    else:
        documents = validation_documents(paths, share, stage.policy, quiet)
        validation = _validation_share(documents, tokenizer, data / "validation", share)
    write_start(dialled, folder / "start", tokenizer, seed)
    return Material(folder / "start", train, validation, dialled)


def tokenizer_of(stage: Pretrain, folder: Path, documents: Callable[[], Iterator[Document]]) -> Tokenizer:
    """The tokenizer that the stage names, or the one in `folder`, trained on `documents` if it is not there.

    Raises:
        UserError: for one without an end mark, and for too little text.
    """
    if stage.tokenizer is None:
        if not folder.exists():
            _train_tokenizer(stage, documents(), folder)
        tokenizer = Tokenizer(folder)
    else:
        tokenizer = Tokenizer(model_folder(stage.tokenizer))
    if tokenizer.eos_id is None:
        raise UserError(
            f"the tokenizer of {tokenizer.folder} has no eos_token, which ends a document; name one"
        )
    return tokenizer


def write_start(dialled: Dialled, folder: Path, tokenizer: Tokenizer, seed: int) -> None:
    """Write the untrained model, if it is not there."""
    if not folder.exists():
        decoder = Decoder(decoder_config(dialled.config))
        decoder.init_weights(seed, dialled.init_std)
        save_decoder(decoder.bfloat16(), dialled.config, folder, tokenizer_from=tokenizer.folder)


def train_pretrain(
    stage: Pretrain,
    material: Material,
    model: Model,
    folder: Path,
    *,
    seed: int,
    meter: Meter,
    on_metrics: Callable[[dict[str, Any]], None],
) -> None:
    """Train `model`, loaded from `material.start`, in place; metrics and checkpoints go to `folder`.

    Raises:
        Diverged: when the gradient says that training is broken.
    """
    dialled = material.dialled
    packer = Packer(
        material.train,
        stage.length,
        seed,
        cross_document=stage.cross_document,
        fim_rate=stage.fim_rate,
        marks=fim_marks(model.tokenizer) if stage.fim_rate else None,
    )
    rows = dialled.batch_tokens // stage.length

    def mtp_weight(step: int) -> float:
        return stage.mtp_weight if step < MTP_FULL * dialled.steps else stage.mtp_weight / 3

    train_lm(
        stage,
        model.decoder,
        model.hf_config,
        folder,
        steps=dialled.steps,
        lr=dialled.lr,
        warmup=dialled.warmup,
        mtp_weight=mtp_weight,
        next_batch=lambda cursor: packer.batch(cursor, rows),
        validation=material.validation,
        validate_every=stage.validate_every,
        meter=meter,
        on_metrics=on_metrics,
    )


def _train_tokenizer(stage: Pretrain, documents: Iterator[Document], folder: Path) -> None:
    partial = folder.with_name(".tokenizer.partial")
    shutil.rmtree(partial, ignore_errors=True)
    special = (*SPECIAL, *FIM) if stage.fim_rate else SPECIAL

    def texts() -> Iterator[str]:
        left = TOKENIZER_CHARACTERS
        for document in documents:
            yield document.text[:left]
            left -= len(document.text)
            if left <= 0:
                return

    train_tokenizer(texts(), stage.vocab_size, partial, special=special)
    partial.rename(folder)


def corpus_of(documents: Callable[[], Iterator[Document]], tokenizer: Tokenizer, folder: Path) -> Corpus:
    """The corpus in `folder`, made of `documents` if it is not there."""
    if folder.exists():
        return Corpus.open(folder)
    assert tokenizer.eos_id is not None
    return Corpus.build(
        documents(),
        tokenizer.text_encoder(),
        folder,
        eos=tokenizer.eos_id,
        vocab_size=len(tokenizer),
        bos=tokenizer.bos_id,
    )


def _validation_share(
    documents: Iterator[Document], tokenizer: Tokenizer, folder: Path, share: float
) -> Corpus:
    """The validation corpus; a share that falls on no document is the user's to mend."""
    if folder.exists():
        return Corpus.open(folder)
    first = next(documents, None)
    if first is None:
        raise UserError(
            f"validation: a share of {share:g} falls on none of the documents; raise it, or give a path of its own"
        )

    def all_of_them() -> Iterator[Document]:
        yield first
        yield from documents

    return corpus_of(all_of_them, tokenizer, folder)
