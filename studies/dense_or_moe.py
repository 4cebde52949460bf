"""Is a mixture of experts cheaper than a dense network at the size one can train at home?

Trains four networks with the same depth, width and active parameters on the same text in the same order, with AdamW and
with Muon and several seeds, and compares them at equal FLOPs, seconds, dollars and tokens (docs/dense-or-moe.md):

    python studies/dense_or_moe.py --data books.jsonl --tokens 800K

Every training is an ordinary run directory in OUT, so the same command continues an interrupted study, and
`farthing compare` compares any of its runs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

import farthing
from farthing.base.errors import UserError
from farthing.base.figures import parse_amount, plural
from farthing.base.files import new_folder, read_json, write, write_json
from farthing.base.terminal import guard
from farthing.cost.flops import parameters
from farthing.data.bpe import SPECIAL, train_tokenizer
from farthing.data.text import Document, documents
from farthing.recipe import Pretrain, Recipe, validate
from farthing.recipe.dial import (
    ASPECT,
    TIED_BELOW,
    TOKENS_PER_PARAMETER,
    best_batch,
    best_rate,
    dial,
    training_flops,
)
from farthing.report import compare, learning_text
from farthing.stages.sources import is_validation

# Name, family of networks, prediction modules: each has one more of DeepSeek's parts than the one before.
FAMILIES = {"dense": ("llama", 0), "moe": ("moe", 0), "mla": ("deepseek", 0), "mtp": ("deepseek", 1)}
OPTIMIZERS = ("adamw", "muon")
TOLERANCE = 0.02  # of the active parameters around the size asked for
EXPERT_STEP, DENSE_STEP = 16, 8  # feed-forward widths are multiples of these
PASSAGE = 32  # characters of a passage for each token of a row: about ten rows of English
ENOUGH = 10  # characters of training text for each token trained on: more than any tokenizer's, so no text comes twice
PARTS = 8  # documents at least that the validation set is of, if there are as many


@dataclass(frozen=True)
class Study:
    """What all trainings share."""

    out: Path
    size: int
    vocab_size: int
    length: int
    tokens: int
    batch_tokens: int | None
    warmup: int
    validate_every: int
    rates: dict[str, float | None]
    """Learning rate by optimizer; None takes DeepSeek LLM's law."""

    def stage(self, family: str, depth: int, width: int, **widths: int) -> Pretrain:
        """A family's pretraining at a shape."""
        network, modules = FAMILIES[family]
        stage = {
            "kind": "pretrain",
            "data": [str(self.out / "data" / "train.jsonl")],
            "validation": str(self.out / "data" / "validation.jsonl"),
            "tokenizer": str(self.out / "data" / "tokenizer"),
            "family": network,
            "depth": depth,
            "mtp_depth": modules,
            "model": {"hidden_size": width, "tie_word_embeddings": self.size < TIED_BELOW, **widths},
            "length": self.length,
            "schedule": "constant",  # so that every point of a curve is the end of a run of that length
            "warmup": self.warmup,
            "validate_every": self.validate_every,
            "checkpoint_every": 10 * self.validate_every,
        }
        return Pretrain.model_validate(stage)


# ---- the text ----


def prepare(study: Study, path: str, field: str, share: float, characters: int) -> None:
    """Write the training passages, the validation set and the tokenizer into OUT/data, unless they are there.

    Raises:
        UserError: for text that cannot be read, a share that falls on no document, and an OUT that was started with
            other settings.
    """
    data = study.out / "data"
    settings = {key: value for key, value in dataclasses.asdict(study).items() if key != "out"}
    settings |= {"data": path, "field": field, "validation": share, "validate_on": characters}
    made = study.out / "settings.json"
    if made.exists():
        for key, before in read_json(made).items():
            if before != settings.get(key):
                raise UserError(
                    f"{study.out} was started with {key} {before!r}, now {settings.get(key)!r}; give the same settings "
                    "to continue it, or another --out"
                )
        return
    try:
        data.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {study.out}: cannot be written ({error.strerror}); give another") from error
    shutil.rmtree(data / "tokenizer", ignore_errors=True)  # of a preparation that was interrupted

    def source(wanted: bool) -> Iterator[Document]:
        found = documents(
            path, field=field, policy="stop", on_problem=lambda text: print(text, file=sys.stderr)
        )
        return (document for document in found if is_validation(document.text, share) is wanted)

    kept = list(slices(source(True), characters))
    if not kept:
        raise UserError(f"--validation {share:g} falls on none of the documents of {path}; raise it")
    found = list(sample(passages(source(False), PASSAGE * study.length), ENOUGH * study.tokens))
    if not found:
        raise UserError(f"--validation {share:g} leaves no document of {path} to train on; lower it")
    write_documents(data / "validation.jsonl", kept)
    write_documents(data / "train.jsonl", found)
    with new_folder(data / "tokenizer") as folder:
        train_tokenizer((document.text for document in found), study.vocab_size, folder, special=SPECIAL)
    write_json(made, settings)  # last: the text is complete, and a mistake above binds nobody


def write_documents(path: Path, found: Iterable[Document]) -> None:
    """One JSON object a line."""
    write(path, "".join(json.dumps({"text": document.text}) + "\n" for document in found))


def slices(found: Iterable[Document], characters: int) -> Iterator[Document]:
    """About `characters` of text in all: from the middle of each document, at most an eighth of that."""
    left, most = characters, max(1, characters // PARTS)
    for document in found:
        if left <= 0:
            return
        length = min(len(document.text), most, left)
        start = (len(document.text) - length) // 2
        text = document.text[start : start + length]
        if text.strip():
            left -= length
            yield Document(text, document.place)


def passages(found: Iterable[Document], characters: int) -> Iterator[Document]:
    """The documents cut into passages of about so many characters, at a line's end where there is one.

    Over whole books a short run would read three of them, and seeds would differ by which.
    """
    for document in found:
        text, start = document.text, 0
        while start < len(text):
            stop = len(text)
            if stop - start > 1.5 * characters:
                line = text.rfind("\n", start + characters // 2, start + characters)
                stop = start + characters if line < 0 else line + 1
            if text[start:stop].strip():
                yield Document(text[start:stop], document.place)
            start = stop


def sample(found: Iterable[Document], characters: int) -> Iterator[Document]:
    """About so many characters of the documents, chosen and ordered by a hash of their text."""
    ranked = sorted(found, key=lambda document: hashlib.sha256(document.text.encode()).digest())
    for document in ranked:
        if characters <= 0:
            return
        characters -= len(document.text)
        yield document


# ---- the networks ----


def active(stage: Pretrain, vocab_size: int) -> int:
    """Parameters a token passes through, embedding and head apart; prediction modules do not count."""
    counted = parameters(dial(stage, vocab_size).config)
    return counted.active - counted.embedding - counted.head


def recipes(study: Study, families: Iterable[str], vocab_size: int) -> dict[str, dict[str, Any]]:
    """The recipes by name, without a seed: every family with every optimizer. All have the same depth, width and active
    parameters, and the batch and the rate of the first family.

    Raises:
        UserError: for a size that has no networks of equal active parameters.
    """
    depth, width = shape(study, vocab_size)
    sized = {family: fitted(study, family, depth, width, vocab_size) for family in families}
    first = dial(next(iter(sized.values())), vocab_size).config
    compute = training_flops(first, study.length) * study.tokens
    batch = study.batch_tokens or max(study.length, round(best_batch(compute)))
    made = {}
    for optimizer, rate in study.rates.items():
        for family, stage in sized.items():
            learning = {"optimizer": optimizer, "lr": rate or best_rate(compute)}
            learning |= {"tokens": study.tokens, "batch_tokens": batch}
            name = f"{family}-{optimizer}"
            keys = stage.model_dump(mode="json", exclude_defaults=True)
            made[name] = {"name": name, "stages": [keys | learning]}
    return made


def shape(study: Study, vocab_size: int) -> tuple[int, int]:
    """Depth and width: of the shapes whose dense network is near the size, the one nearest to the dial's aspect."""
    best, width = (math.inf, 0, 0), 0
    while True:
        width += ASPECT
        one, two = (active(study.stage("dense", layers, width), vocab_size) for layers in (1, 2))
        middle = width / ASPECT
        first, last = max(1, math.ceil(0.75 * middle)), max(2, int(1.5 * middle))
        for depth in range(first, last + 1):
            off = abs(math.log((one + (depth - 1) * (two - one)) / study.size))
            # Within a fifth of the size the shape decides: the feed-forward width makes up for the rest.
            best = min(best, (max(off, 0.2) + 0.01 * abs(math.log(depth / middle)), depth, width))
        if one + (first - 1) * (two - one) > 2 * study.size:
            return best[1], best[2]


def fitted(study: Study, family: str, depth: int, width: int, vocab_size: int) -> Pretrain:
    """The family's stage at this shape, with the feed-forward widths that give it the size."""

    def count(**widths: int) -> int:
        return active(study.stage(family, depth, width, **widths), vocab_size)

    widths: dict[str, int] = {}
    if family != "dense" and depth > 1:  # experts together as wide as the dense layer, as in the dial
        config = dial(study.stage(family, depth, width), vocab_size).config
        chosen = config["num_experts_per_tok"] + config["n_shared_experts"]
        widths["moe_intermediate_size"] = solve(
            lambda expert: count(moe_intermediate_size=expert, intermediate_size=chosen * expert),
            study.size,
            EXPERT_STEP,
        )
    widths["intermediate_size"] = solve(
        lambda dense: count(**widths | {"intermediate_size": dense}), study.size, DENSE_STEP
    )
    total = count(**widths)
    if abs(total / study.size - 1) > TOLERANCE:
        raise UserError(
            f"--size: no {family} network of {depth} layers and width {width} comes within {TOLERANCE:.0%} of "
            f"{study.size:,} active parameters (embedding and head apart); the nearest has {total:,}: change --size"
        )
    return study.stage(family, depth, width, **widths)


def solve(count: Callable[[int], int], size: int, step: int) -> int:
    """The multiple of `step`, at least one, at which `count`, which is linear, comes nearest to `size`."""
    at_one, at_two = count(step), count(2 * step)
    return max(step, step * round(1 + (size - at_one) / (at_two - at_one)))


# ---- the runs ----


def in_turn(names: list[str], seeds: int) -> Iterator[tuple[str, int]]:
    """The trainings in order, (name, seed): families take turns within a seed, and each seed begins with another, so
    that a disturbance of the machine does not fall on one family alone."""
    for seed in range(seeds):
        for optimizer in OPTIMIZERS:
            mine = [name for name in names if name.endswith(f"-{optimizer}")]
            turn = seed % len(mine) if mine else 0
            for name in mine[turn:] + mine[:turn]:
                yield name, seed


def check_comparable(study: Study, made: dict[str, dict[str, Any]]) -> None:
    """Refuse before any training what could not be compared after it."""
    stage = recipe(next(iter(made.values())), 0).stages[0]
    assert isinstance(stage, Pretrain)
    steps = dial(stage, study.vocab_size).steps
    if steps <= study.validate_every:
        raise UserError(
            f"--validate-every {study.validate_every}: {plural(steps, 'step')} would be validated only once, and a "
            "curve needs two points; lower it, or raise --tokens"
        )


def train(study: Study, made: dict[str, dict[str, Any]], seeds: int) -> list[Path]:
    """Run what is missing; the run directories in order.

    Raises:
        UserError: for a run, finished or not, that was started with other settings.
    """
    runs = {
        study.out / f"{name}-{seed + 1}": recipe(made[name], seed)
        for name, seed in in_turn(list(made), seeds)
    }
    missing = [folder for folder in runs if not (folder / "results.json").exists()]
    for folder in runs:
        if folder not in missing:
            run(runs[folder], folder)
    if missing:
        warm_up(study, made)
    for number, folder in enumerate(runs, 1):
        if folder in missing:
            print(f"{number} of {len(runs)}: {folder.name}", file=sys.stderr, flush=True)
            run(runs[folder], folder)
    return list(runs)


def run(of: Recipe, folder: Path) -> None:
    """Run a recipe, or continue it; a finished run only checks that it was the same recipe."""
    try:
        farthing.run(of, folder, quiet=True)  # type: ignore[operator]  # mypy takes it for farthing.runs.run
    except UserError as mistake:
        raise UserError(str(mistake).replace("--run-dir", "--out")) from mistake


def warm_up(study: Study, made: dict[str, dict[str, Any]]) -> None:
    """Throw-away runs of a step, so that what a kernel does once is on no run's clock."""
    with tempfile.TemporaryDirectory(dir=study.out) as place:
        for name, data in made.items():
            [stage] = data["stages"]
            short = {**data, "stages": [stage | {"tokens": stage["batch_tokens"]}]}
            run(recipe(short, 0), Path(place) / name)


def recipe(data: dict[str, Any], seed: int) -> Recipe:
    """A recipe with its seed."""
    return validate({**data, "seed": seed})


def conclude(study: Study, folders: list[Path]) -> str:
    """Compare the families under each optimizer; the text of OUT/study.md, beside which the curves are drawn."""
    parts = []
    for optimizer in study.rates:
        mine = sorted((f for f in folders if f"-{optimizer}-" in f.name), key=lambda f: family_order(f.name))
        found = compare.compare(mine).learning
        assert found is not None
        for axis in found["equal"]:
            drawn = learning_text.drawing(found, axis)
            write(study.out / f"{optimizer}-{axis}.svg", f"{drawn}\n")
        write(study.out / f"{optimizer}.json", json.dumps(found, indent=1) + "\n")
        parts.append(f"## {optimizer}\n\n{learning_text.markdown(found)}")
    text = "\n".join(parts)
    write(study.out / "study.md", text)
    return text


def family_order(name: str) -> int:
    """Place of a run's family in the order of the parts it has."""
    return list(FAMILIES).index(name.partition("-")[0])


def amount(text: str, name: str) -> int:
    """A whole number as people write it: 360K, 1M."""
    return round(parse_amount(text, name))


def main(
    data: Annotated[
        str, typer.Option(help="Text: a .jsonl, .parquet or .txt file, a folder, or hf:owner/name.")
    ],
    out: Annotated[Path, typer.Option(help="Where the runs go.")] = Path("runs/dense-or-moe"),
    size: Annotated[str, typer.Option(help="Active parameters, embedding and head apart.")] = "1M",
    tokens: Annotated[
        str | None, typer.Option(help="Tokens of each training; by default 20 per parameter.")
    ] = None,
    batch_tokens: Annotated[str | None, typer.Option(help="Tokens per step.")] = "8192",
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of each network and optimizer.")] = 3,
    families: Annotated[str, typer.Option(help="The networks to train, separated by commas.")] = ",".join(
        FAMILIES
    ),
    adamw: Annotated[float, typer.Option(help="AdamW's learning rate; 0 takes DeepSeek LLM's law.")] = 2e-3,
    muon: Annotated[float, typer.Option(help="Muon's learning rate; 0 takes DeepSeek LLM's law.")] = 4e-3,
    vocab_size: Annotated[int, typer.Option(min=270, help="Entries of the tokenizer.")] = 2048,
    length: Annotated[int, typer.Option(min=2, help="Tokens in a row.")] = 256,
    warmup: Annotated[int, typer.Option(min=0, help="Steps of linear warm-up.")] = 10,
    validate_every: Annotated[int, typer.Option(min=1, help="Steps between validations.")] = 5,
    validate_on: Annotated[str, typer.Option(help="Characters of validation text.")] = "48K",
    validation: Annotated[float, typer.Option(help="Share of the documents kept for validation.")] = 0.1,
    field: Annotated[str, typer.Option(help="Field of the text.")] = "text",
) -> None:
    """Train dense networks and mixtures of experts of equal active parameters, and compare them."""
    chosen = [name.strip() for name in families.split(",")]
    unknown = [name for name in chosen if name not in FAMILIES]
    if unknown or len(set(chosen)) < len(chosen):
        raise UserError(f"--families {families}: name each of {', '.join(FAMILIES)} at most once")
    if not 0 < validation < 1:
        raise UserError(f"--validation {validation:g}: must be a share above 0 and below 1")
    if len(chosen) < 2:
        raise UserError(f"--families {families}: name at least two of {', '.join(FAMILIES)}, to be compared")
    for name, rate in (("--adamw", adamw), ("--muon", muon)):
        if not 0 <= rate < math.inf:
            raise UserError(f"{name} {rate:g}: must be a learning rate above 0, or 0 for DeepSeek LLM's law")
    parameters_asked = amount(size, "--size")
    study = Study(
        out=out,
        size=parameters_asked,
        vocab_size=vocab_size,
        length=length,
        tokens=amount(tokens, "--tokens") if tokens else TOKENS_PER_PARAMETER * parameters_asked,
        batch_tokens=amount(batch_tokens, "--batch-tokens") if batch_tokens else None,
        warmup=warmup,
        validate_every=validate_every,
        rates={"adamw": adamw or None, "muon": muon or None},
    )
    made = recipes(study, chosen, study.vocab_size)
    check_comparable(study, made)
    prepare(study, data, field, validation, amount(validate_on, "--validate-on"))
    print(conclude(study, train(study, made, seeds)))


def command_line(words: list[str]) -> int:
    """Run the command; its exit code. Mistakes and Ctrl-C are one line on standard error."""
    app = typer.Typer(add_completion=False)
    app.command()(main)
    command = typer.main.get_command(app)
    usage_error: type[Exception] = typer.BadParameter.__mro__[
        1
    ]  # click's UsageError, wherever typer keeps it
    try:  # command() would write boxes and swallow Ctrl-C
        with command.make_context("dense_or_moe", words) as context:
            command.invoke(context)
        sys.stdout.flush()
    except typer.Exit as done:
        return done.exit_code
    except (UserError, usage_error) as mistake:
        said = mistake.format_message() if hasattr(mistake, "format_message") else str(mistake)
        print(f"dense_or_moe: {' '.join(said.split())}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # stdout's reader, such as `head`, has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print(
            "dense_or_moe: interrupted; finished runs are kept, and the same command continues",
            file=sys.stderr,
        )
        return 130
    return 0


if __name__ == "__main__":
    guard()
    sys.exit(command_line(sys.argv[1:]))
