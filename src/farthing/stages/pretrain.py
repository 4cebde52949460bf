"""Training from scratch: prepare data, a tokenizer and an untrained model, then train.

What is prepared stays in the stage's folder and is made once:

    data/lessons-N.jsonl      worked solutions, if the recipe asks for any
    data/tokenizer/           the tokenizer, if it is trained here
    data/train, validation    the documents as tokens
    start/                    the untrained model, a model folder like any other
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from farthing.base.device import Ranks
from farthing.base.errors import UserError
from farthing.base.figures import plural
from farthing.base.files import new_folder
from farthing.cost.flops import parameters
from farthing.cost.meter import Meter
from farthing.data.bpe import SPECIAL, train_tokenizer
from farthing.data.copies import NearCopies
from farthing.data.corpus import Corpus
from farthing.data.left_out import LEFT_OUT, LeftOut
from farthing.data.overlap import HeldOut
from farthing.data.packing import FIM, Packer, fim_marks
from farthing.data.text import Document
from farthing.data.tokenizer import Tokenizer
from farthing.engine import Model
from farthing.model import Decoder
from farthing.recipe import Pretrain
from farthing.recipe.dial import Dialled, dial
from farthing.stages.at import At, Say
from farthing.stages.pieces import Pieces
from farthing.stages.sources import (
    all_documents,
    silent,
    source_paths,
    training_documents,
    validation_documents,
)
from farthing.train.lm import train_lm
from farthing.train.loop import Progress
from farthing.weights import decoder_config, save_decoder
from farthing.weights.sources import model_folder

TOKENIZER_CHARACTERS = 200_000_000  # of the training text, at most, decide the tokenizer
MTP_FULL = 2 / 3  # of the tokens at mtp_weight, the rest at a third of it: V3's 10 of 14.8 T at 0.3, then 0.1


@dataclass(frozen=True)
class Prepared:
    """The model and data of a pretraining stage."""

    start: Path
    """The untrained model's folder."""
    train: Corpus
    validation: Corpus
    dialled: Dialled

    def facts(self) -> dict[str, Any]:
        """Counts and hashes of the text, for done.json."""
        return {
            name: {"documents": c.documents, "tokens": c.tokens, "bytes": c.bytes, "sha256": c.sha256}
            for name, c in (("train", self.train), ("validation", self.validation))
        }


def run(spec: Pretrain, start: Path | None, at: At) -> Path:
    """As `stages.Kind.run`."""
    assert start is None
    with at.meter.span("load"), at.waiting("preparing the data, the tokenizer and the untrained model"):
        prepared = prepare_pretrain(spec, at.folder, seed=at.seed, held_out=at.held_out, say=at.warn)
    model = at.load(prepared.start)
    dialled, counted = prepared.dialled, parameters(model.hf_config)
    at.say(
        f"{at.folder.name}: {counted.total:,} parameters ({counted.active:,} a token), {dialled.tokens:,} tokens in "
        f"{plural(dialled.steps, 'step')} of {dialled.batch_tokens:,}, learning rate {dialled.lr:.2g}"
    )
    with at.progress(dialled.steps) as progress:
        train_pretrain(
            spec,
            prepared,
            model,
            at.folder,
            seed=at.seed,
            meter=at.meter,
            ranks=at.ranks,
            progress=progress,
        )
    return at.finish(
        model,
        dialled.steps,
        parameters=counted.total,
        active=counted.active,
        tokens=dialled.tokens,
        data=prepared.facts(),
    )


def prepare_pretrain(stage: Pretrain, folder: Path, *, seed: int, held_out: HeldOut, say: Say) -> Prepared:
    """Read the data, train the tokenizer and write the untrained model, each unless it is there already.

    Args:
        held_out: questions that no document may show.
        say: called with the number of documents that cannot be used, and three of them.

    Raises:
        UserError: for data that cannot be read or is too little, a validation set without documents, a tokenizer
            without an end-of-text mark, and a model that cannot be built.
    """
    pieces = Pieces(folder, say, seed)
    paths = source_paths(stage.data, pieces, seed, held_out)
    share = stage.validation if isinstance(stage.validation, float) else 0.0
    field = stage.data[0].field

    @cache
    def validation_texts() -> NearCopies:
        if isinstance(path := stage.validation, str):
            kept = all_documents(path, field, stage.policy, silent)
        else:
            kept = validation_documents([p for p in paths if p[0].path], share, stage.policy, silent)
        return NearCopies(document.text for document in kept)

    def training(report: Say) -> Iterator[Document]:
        return training_documents(paths, share, stage.policy, report, held_out, validation_texts())

    # The tokenizer may stop before the end of the data; the pass after it reports what all of it lacks.
    with LeftOut(folder / LEFT_OUT, say, only_after_errors=True) as left_out:
        tokenizer = tokenizer_of(stage, pieces, lambda: training(left_out))
    dialled = dial(stage, tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id)
    with LeftOut(folder / LEFT_OUT, say) as left_out:
        train = corpus_of(lambda: training(left_out), tokenizer, pieces, "train")
        if isinstance(path := stage.validation, str):
            validation = corpus_of(
                lambda: all_documents(path, field, stage.policy, left_out), tokenizer, pieces, "validation"
            )
    if not isinstance(stage.validation, str):
        documents = validation_documents(paths, share, stage.policy, silent)
        validation = _validation_share(documents, tokenizer, pieces, share)
    write_start(dialled, pieces, tokenizer, seed)
    return Prepared(folder / "start", train, validation, dialled)


def tokenizer_of(stage: Pretrain, pieces: Pieces, documents: Callable[[], Iterator[Document]]) -> Tokenizer:
    """The tokenizer that the stage names, or the stage's own, trained on `documents` unless it is there.

    Raises:
        UserError: for one without an end-of-text mark, and for too little text.
    """
    if stage.tokenizer is None:
        folder = pieces.folder / "data" / "tokenizer"
        if not pieces.has(folder):
            _train_tokenizer(stage, documents(), folder)
            pieces.record(folder)
        tokenizer = Tokenizer(folder)
    else:
        own = Path(stage.tokenizer)
        tokenizer = Tokenizer(own if (own / "tokenizer.json").is_file() else model_folder(stage.tokenizer))
    if tokenizer.eos_id is None:
        raise UserError(
            f"the tokenizer of {tokenizer.folder} has no eos_token to end documents with; name another"
        )
    return tokenizer


def write_start(dialled: Dialled, pieces: Pieces, tokenizer: Tokenizer, seed: int) -> None:
    """Write the untrained model, unless it is there."""
    folder = pieces.folder / "start"
    if not pieces.has(folder):
        decoder = Decoder(decoder_config(dialled.config))
        decoder.init_weights(seed, dialled.init_std)
        save_decoder(decoder.bfloat16(), dialled.config, folder, tokenizer_from=tokenizer.folder)
        pieces.record(folder)


def train_pretrain(
    stage: Pretrain,
    prepared: Prepared,
    model: Model,
    folder: Path,
    *,
    seed: int,
    meter: Meter,
    ranks: Ranks,
    progress: Progress,
) -> None:
    """Train `model`, loaded from `prepared.start`, in place; metrics and checkpoints go to `folder`.

    Raises:
        Diverged: when the gradient says that training is broken.
    """
    dialled = prepared.dialled
    packer = Packer(
        prepared.train,
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
        validation=prepared.validation,
        validate_every=stage.validate_every,
        meter=meter,
        ranks=ranks,
        progress=progress,
    )


def _train_tokenizer(stage: Pretrain, documents: Iterator[Document], folder: Path) -> None:
    special = (*SPECIAL, *FIM) if stage.fim_rate else SPECIAL

    def texts() -> Iterator[str]:
        left = TOKENIZER_CHARACTERS
        for document in documents:
            yield document.text[:left]
            left -= len(document.text)
            if left <= 0:
                return

    with new_folder(folder) as partial:
        train_tokenizer(texts(), stage.vocab_size, partial, special=special)


def corpus_of(
    documents: Callable[[], Iterator[Document]], tokenizer: Tokenizer, pieces: Pieces, name: str
) -> Corpus:
    """The stage's corpus of that name, built from `documents` unless it is there."""
    folder = pieces.folder / "data" / name
    if pieces.has(folder):
        return Corpus.open(folder)
    assert tokenizer.eos_id is not None
    corpus = Corpus.build(
        documents(),
        tokenizer.text_encoder(),
        folder,
        eos=tokenizer.eos_id,
        vocab_size=tokenizer.vocab_size,
        bos=tokenizer.bos_id,
    )
    pieces.record(folder)
    return corpus


def _validation_share(
    documents: Iterator[Document], tokenizer: Tokenizer, pieces: Pieces, share: float
) -> Corpus:
    """The validation corpus.

    Raises:
        UserError: for a share so small that it falls on no document.
    """
    if (pieces.folder / "data" / "validation").exists():  # `corpus_of` verifies it
        return corpus_of(lambda: documents, tokenizer, pieces, "validation")
    first = next(documents, None)
    if first is None:
        raise UserError(
            f"validation: a share of {share:g} falls on none of the documents; raise it, or give a path of its own"
        )

    def all_of_them() -> Iterator[Document]:
        yield first
        yield from documents

    return corpus_of(all_of_them, tokenizer, pieces, "validation")
