"""Suites of held-out questions put to one model or several, and what comes of it.

A suite is a mixture of tasks with a name. Every model is asked the same questions, so two are compared pair by pair.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self

from farthing.base.device import choose
from farthing.base.errors import UserError
from farthing.base.figures import plural
from farthing.base.files import read_json, sha256, write, write_json
from farthing.base.limits import unwritable
from farthing.base.waiting import Waiting
from farthing.engine import load
from farthing.engine.asked import Asked
from farthing.evaluate.ask import evaluate
from farthing.evaluate.score import Record, gain, summarise
from farthing.evaluate.trained import untrained
from farthing.recipe import Asks
from farthing.tasks import Item
from farthing.tasks.check import check_tasks
from farthing.tasks.mixture import Mixture
from farthing.tasks.pool import VerifierPool
from farthing.tasks.rewards.beside import Beside

Say = Callable[[str], None]


@dataclass(frozen=True)
class Suite:
    """Questions to ask, and how."""

    name: str
    asks: Asks
    n: int
    """Number of questions."""
    samples: int = 1
    """Answers to each."""
    temperature: float = 0.0
    by_likelihood: bool = False
    """Compare the likelihoods of the endings of a question that has some, instead of asking it."""


class Answers:
    """The answers on disk, a line of JSON each: added as they come, and put in order at the end.

    Beside them, until all are there, lies what was asked (`asked_beside`): the same evaluation goes on from there.

    Raises:
        UserError: if the file is there already and is none that an interrupted evaluation left, or cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.count = path, 0
        self._asked_path = asked_beside(path)
        self._asked: dict[str, Any] = {}
        self._earlier: list[Record] = []
        if path.exists() and (path.is_dir() or path.stat().st_size):
            if path.is_dir() or not self._asked_path.exists():
                raise UserError(f"{path} exists; give another --save, or delete it")
            self._asked = read_json(self._asked_path, f"delete it and {path} to start anew")
            self._earlier = _whole_lines(path)
        self._kept: list[Record] = []
        self._file: IO[str] | None = None

    def __enter__(self) -> Self:
        try:
            if self._earlier:  # without a torn line, behind which nothing could be added
                write(self.path, "".join(json.dumps(record) + "\n" for record in self._earlier))
            self._file = self.path.open("a" if self._earlier else "w", encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be written ({error.strerror}); give another --save"
            ) from None
        return self

    def earlier(self, model: str, suite: str, asked: dict[str, Any], samples: int) -> list[Record]:
        """What an interrupted evaluation has of a suite: the questions that have all their answers.

        Args:
            asked: what is asked now, of which model.

        Raises:
            UserError: if something else was asked then.
        """
        key, asked = f"{model} {suite}", json.loads(json.dumps(asked))
        if self._asked.setdefault(key, asked) != asked:
            changed = ", ".join(name for name in asked if asked[name] != self._asked[key].get(name))
            raise UserError(
                f"{self.path} has answers of an interrupted evaluation of {model}, since when other things have "
                f"changed ({changed}); give another --save, or delete it"
            )
        write_json(self._asked_path, self._asked)
        mine = [record for record in self._earlier if (record["model"], record["suite"]) == (model, suite)]
        by_place = {(record["index"], record.get("sample", 0)): record for record in mine}
        answers = Counter(index for index, _ in by_place)
        found = [
            record
            for (index, _), record in by_place.items()
            if answers[index] == samples or "sample" not in record  # by likelihood a question has one
        ]
        self.count += len(found)
        return [{k: v for k, v in record.items() if k not in ("model", "suite")} for record in found]

    def add(self, model: str, suite: str, records: Sequence[Record]) -> None:
        assert self._file is not None
        try:
            for record in records:
                self._file.write(json.dumps({"model": model, "suite": suite, **record}) + "\n")
            self._file.flush()
        except OSError as error:
            raise UserError(f"{self.path}: {unwritable(error) or error}; free some space") from error
        self.count += len(records)

    def keep(self, model: str, suite: str, records: Sequence[Record]) -> None:
        """The records of a suite in order, for the file at the end."""
        self._kept += [{"model": model, "suite": suite, **record} for record in records]

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        assert self._file is not None
        self._file.close()
        if kind is None and self.count:
            write(self.path, "".join(json.dumps(record) + "\n" for record in self._kept))
        elif not self.path.stat().st_size:
            self.path.unlink()
        if kind is None or not self.path.exists():
            self._asked_path.unlink(missing_ok=True)


def asked_beside(path: Path) -> Path:
    """Where it is written what an evaluation that is not finished asks."""
    return path.with_name(f".{path.name}.asked")


def _whole_lines(path: Path) -> list[Record]:
    """The answers of an interrupted evaluation; the last line may be torn."""
    found: list[Record] = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(ValueError, RecursionError):
            record = json.loads(text)
            if (
                isinstance(record, dict)
                and {"model", "suite", "index", "outcome", "question"} <= record.keys()
            ):
                found.append(record)
    return found


def _asked(
    suite: Suite, items: Sequence[Item], seed: int, speculate: int, quantize: str, folder: Path
) -> dict[str, Any]:
    """All that answers depend on: the model's files by size and time, the questions, and how they are asked."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    questions = json.dumps([(item.asked, item.answer, item.system) for item in items])
    asks = suite.asks
    rewards = [item.metadata.get("rewards") for item in items]
    own = {part["use"].rpartition(":")[0] for parts in rewards for part in parts or ()}
    code = sorted(sha256(Path(path)) for path in own if path.endswith(".py"))
    return {
        "model": hashlib.sha256(json.dumps(stats).encode()).hexdigest(),
        "questions": hashlib.sha256(questions.encode()).hexdigest(),
        "prompt": [asks.prompt, asks.system, str(asks.answer)],
        "rewards": hashlib.sha256(json.dumps([rewards, code]).encode()).hexdigest(),
        "max_new_tokens": asks.max_new_tokens,
        "samples": suite.samples,
        "temperature": suite.temperature,
        "by_likelihood": suite.by_likelihood,
        "seed": seed,
        "speculate": speculate,
        **({} if quantize == "exact" else {"quantize": quantize}),
    }


def evaluate_sources(
    sources: Sequence[str],
    suites: Sequence[Suite],
    *,
    seed: int = 0,
    speculate: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    quantize: str = "exact",
    save: Path | None = None,
    say: Say = lambda _: None,
) -> dict[str, Any]:
    """Ask every model every suite's questions; returns what `farthing eval` prints.

    Args:
        speculate: tokens to guess a step with the model's prediction modules; each summary then has `acceptance`, the
            share of right guesses at each depth.
        device, dtype, quantize: as in `load`.
        save: a file for the answers.
        say: called with a line for whatever takes longer than two seconds, and with what is kept of an interrupted
            evaluation.

    Returns:
        of one model and one suite the summary; else {"models": [{"name", "suites": [summary, …]}, …]} and, where there
        are two, "compared": the change from the first to the second by suite.

    Raises:
        UserError: when a source cannot be loaded, a task does not exist, n is not positive, several greedy samples are
            asked for, or the model has too few prediction modules.
    """
    for suite in suites:
        if suite.n < 1:
            raise UserError(f"n is {suite.n}; ask at least one question")
        if suite.samples > 1 and suite.temperature == 0:
            raise UserError(
                f"{suite.samples} samples at temperature 0 are all the same; give --temperature 0.6"
            )
    answers = Answers(save) if save is not None else None  # refuses before anything takes long
    questions = _questions(sources, suites, seed, say)
    total = len(sources) * sum(
        len(items) * suite.samples for suite, items in zip(suites, questions, strict=True)
    )
    found: list[list[list[Record]]] = []
    models: list[dict[str, Any]] = []
    try:
        asking = Beside(Asked(choose(device, dtype), say))
        with answers or _Nowhere(), VerifierPool(asking=asking) as pool:
            for source in sources:
                with Waiting(f"loading {source}", say):
                    model = load(source, dtype, device, quantize)
                found.append([])
                summaries = []
                for suite, items in zip(suites, questions, strict=True):

                    def kept(new: list[Record], source: str = source, suite: Suite = suite) -> None:
                        if answers is not None:
                            answers.add(source, suite.name, new)

                    earlier = (
                        answers.earlier(
                            source,
                            suite.name,
                            _asked(suite, items, seed, speculate, quantize, model.tokenizer.folder),
                            suite.samples,
                        )
                        if answers is not None
                        else []
                    )
                    if earlier:
                        say(
                            f"{suite.name}: {plural(len(earlier), 'answer')} of {source} are in {save} already"
                        )
                    what = f"{suite.name}: " if len(suites) > 1 else ""
                    with Waiting(f"{what}asking {plural(len(items), 'question')}", say) as waiting:
                        records, work = evaluate(
                            model,
                            items,
                            suite.asks,
                            pool,
                            temperature=suite.temperature,
                            seed=seed,
                            samples=suite.samples,
                            by_likelihood=suite.by_likelihood,
                            speculate=speculate,
                            told=waiting.at,
                            kept=kept,
                            earlier=earlier,
                        )
                    if answers is not None:
                        answers.keep(source, suite.name, records)
                    summary = summarise(suite.name, records)
                    summaries.append({**summary, "acceptance": work.acceptance} if speculate else summary)
                    found[-1].append(records)
                models.append({"name": source, "suites": summaries})
                del model  # its memory is needed
    except BaseException:
        if answers is not None and answers.count:
            kept_in = f"{answers.count:,} of {total:,} answers are kept in {answers.path}"
            say(f"{kept_in}; the same command goes on from there")
        raise
    if len(sources) == len(suites) == 1:
        return {**models[0]["suites"][0], "name": sources[0]}
    card: dict[str, Any] = {"models": models}
    if len(sources) == 2:
        compared = [
            {"suite": suite.name, **gain(*pair)}
            for suite, pair in zip(suites, zip(*found, strict=True), strict=True)
        ]
        card["compared"] = compared
    return card


def _questions(sources: Sequence[str], suites: Sequence[Suite], seed: int, say: Say) -> list[list[Item]]:
    """The questions of every suite; none that one of the models was trained on."""
    for suite in suites:
        check_tasks(suite.asks.tasks)
    with Waiting("choosing questions", say):
        mixtures = [Mixture(suite.asks.tasks, seed) for suite in suites]
        wanted = [(mixture, suite.n) for suite, mixture in zip(suites, mixtures, strict=True)]
        found = untrained(wanted, map(Path, sources), say)
    for line in (line for mixture in mixtures for line in mixture.said):
        say(line)
    return found


class _Nowhere:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...
