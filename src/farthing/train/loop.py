"""The training loop of every stage: steps, metrics, checkpoints, resuming, and stopping.

A step is a function of the step number, the weights and a small `state` the stage keeps (a data cursor);
nothing else may influence it, so a killed run that continues from a checkpoint repeats the lost steps exactly.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from farthing.base.errors import UserError
from farthing.base.files import appending, write
from farthing.base.heap import Heap
from farthing.cost.meter import Meter
from farthing.train import checkpoint
from farthing.train.optim import MasterWeights


class Diverged(UserError):
    """Training produced numbers that cannot be trained on."""


_METRICS = "metrics_sha256"  # in a checkpoint: of the lines until then
_ORIGIN = "origin"  # in a checkpoint: of the run that wrote it


def _nothing(_: object) -> None:
    pass


def _no_measure(_: int) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Progress:
    """Where training reports, and how it is measured; nowhere and not at all by default."""

    update: Callable[[dict[str, Any]], None] = _nothing
    """Takes a step that was just done: its line of metrics.jsonl."""
    recall: Callable[[dict[str, Any]], None] = _nothing
    """Takes a step of an earlier attempt, which the checkpoint holds."""
    say: Callable[[str], None] = _nothing
    """Takes a sentence about what is being done."""
    warn: Callable[[str], None] = _nothing
    """Takes a sentence that matters to the result."""
    measure: Callable[[int], dict[str, Any]] = _no_measure
    """Measures the weights after so many steps, by them alone: more entries of the step's line."""
    best: str = ""
    """The measurement whose highest value, the first of equal ones, decides which weights training leaves; "" leaves
    the last."""
    origin: str = ""
    """Of the run: a checkpoint with another one is not continued from."""


def train(
    folder: Path,
    steps: int,
    weights: MasterWeights,
    state: dict[str, Any],
    one_step: Callable[[int], dict[str, Any]],
    *,
    meter: Meter,
    checkpoint_every: int,
    progress: Progress,
    buffers: Mapping[str, Tensor] | None = None,
) -> None:
    """Run steps 0..steps-1, or those left after the newest intact checkpoint in `folder`/state.

    Args:
        state: what `one_step` reads and updates besides the weights; JSON, saved with each checkpoint.
        one_step: does one step and returns its metrics.
        buffers: tensors that `one_step` changes besides the weights; saved and restored in place.

    Raises:
        Diverged: if a step meets NaN or an exploding gradient; names the cause and the last good checkpoint.
        UserError: when the disk is full.
    """
    folder.mkdir(parents=True, exist_ok=True)
    done, written = 0, None
    with meter.span("load"):
        found = checkpoint.latest(folder / "state", progress.warn)
        if found is not None:
            done, tensors, saved = found
            written = saved.pop(_METRICS, None)  # 0.1.0 wrote none
            foreign = saved.pop(_ORIGIN, progress.origin) != progress.origin
            if foreign or done > steps or saved.keys() != state.keys():
                raise UserError(
                    f"{folder / 'state'}: the checkpoint of step {done} is of another run; remove {folder} to train "
                    "from the start, or give another --run-dir"
                )
            weights.restore(tensors)
            for name, tensor in (buffers or {}).items():
                tensor.data.copy_(tensors[name])
            state.update(saved)
            if done < steps:
                progress.say(f"continuing from step {done:,} of {steps:,}")
    metrics = _MetricsFile(folder / "metrics.jsonl", keep=done)
    if written not in (None, metrics.digest()):
        progress.warn(
            f"{folder / 'metrics.jsonl'} is not what the checkpoint of step {done} was written with: either it has "
            "changed, which changes only what is shown of those steps, or the checkpoint is another run's"
        )
        if progress.best:
            metrics.take_best(progress.best, checkpoint.latest(folder / "best", progress.warn, until=done))
    for line in metrics.kept:
        progress.recall(line)
    heap = Heap()
    try:
        for step in range(done, steps):
            try:
                line = one_step(step)
            except Diverged as error:
                last = checkpoint.newest_step(folder / "state")
                kept = f"the weights of step {last} are kept in {folder / 'state'}"
                where = kept if last else "nothing was trained yet"
                what = f"training stopped at step {step + 1}: {error}; {where}"
                raise Diverged(what) from error
            heap.settle()
            line |= progress.measure(step + 1)
            if progress.best and _is_best(line, metrics.kept, progress.best):
                with meter.span("checkpoint", step=step):
                    _keep_best(folder, line, weights, buffers or {}, progress)
            metrics.append(line)
            progress.update(line)
            if (step + 1) % checkpoint_every == 0 or step + 1 == steps:
                with meter.span("checkpoint", step=step):
                    metrics.sync()
                    tensors = {**weights.state(), **{name: t.detach() for name, t in (buffers or {}).items()}}
                    meta = state | {_METRICS: metrics.digest(), _ORIGIN: progress.origin}
                    checkpoint.save(folder / "state", step + 1, tensors, meta)
    finally:
        metrics.close()
    if progress.best:
        _take_best(folder, metrics.kept, weights, buffers or {}, progress)


def best_step(lines: Sequence[Mapping[str, Any]], key: str) -> int | None:
    """The step with the highest value of `key`, the first of equal ones; None where no line has it."""
    found = [line for line in lines if line.get(key) is not None]
    return max(found, key=lambda line: line[key])["step"] if found else None


def _is_best(line: Mapping[str, Any], before: Sequence[Mapping[str, Any]], key: str) -> bool:
    return line.get(key) is not None and best_step([*before, line], key) == line["step"]


def _keep_best(
    folder: Path,
    line: Mapping[str, Any],
    weights: MasterWeights,
    buffers: Mapping[str, Tensor],
    progress: Progress,
) -> None:
    """Keep the weights of a step, without what the optimizer remembers."""
    tensors = {name: tensor for name, tensor in weights.state().items() if name.startswith("master.")}
    tensors |= {name: tensor.detach() for name, tensor in buffers.items()}
    meta = {progress.best: line[progress.best], _ORIGIN: progress.origin}
    checkpoint.save(folder / "best", line["step"], tensors, meta)


def _take_best(
    folder: Path,
    lines: Sequence[Mapping[str, Any]],
    weights: MasterWeights,
    buffers: Mapping[str, Tensor],
    progress: Progress,
) -> None:
    """Put the best step's weights into the network."""
    wanted, found = best_step(lines, progress.best), checkpoint.latest(folder / "best", progress.warn)
    if wanted is None:
        return
    if found is None or found[0] != wanted or found[2].get(_ORIGIN, progress.origin) != progress.origin:
        progress.warn(f"the weights of step {wanted}, the best, are gone; the last ones are left instead")
        return
    weights.restore(found[1])
    for name, tensor in buffers.items():
        tensor.data.copy_(found[1][name])
    progress.say(f"no step answered more of the held-out subset than step {wanted}, whose weights are kept")


def check_norm(norm: float, limit: float) -> None:
    """Refuse a gradient that is not a number or larger than `limit`, before it reaches the weights.

    Raises:
        Diverged: with the norm.
    """
    if not math.isfinite(norm):
        raise Diverged(f"the gradient is {norm}; lower lr and take another --run-dir")
    if norm > limit:
        raise Diverged(
            f"the gradient's norm is {norm:.1f}, above max_grad_norm {limit:g}; lower lr and take another --run-dir"
        )


class _MetricsFile:
    """metrics.jsonl, truncated to the steps that a checkpoint covers; later steps will be repeated."""

    def __init__(self, path: Path, keep: int) -> None:
        self.kept: list[dict[str, Any]] = []
        if path.exists():
            for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    line = json.loads(text)
                except (ValueError, RecursionError):
                    continue
                step = line.get("step") if isinstance(line, dict) else None
                if isinstance(step, int) and step <= keep:
                    self.kept.append(line)
        self._path = path
        self._write()

    def _write(self) -> None:
        texts = [json.dumps(line) + "\n" for line in self.kept]
        write(self._path, "".join(texts))
        self._file, self._hash = appending(self._path), hashlib.sha256("".join(texts).encode())

    def digest(self) -> str:
        """Hash of all lines until now."""
        return self._hash.hexdigest()

    def take_best(self, key: str, best: tuple[int, dict[str, Tensor], dict[str, Any]] | None) -> None:
        """Forget what damaged lines say of `key`, and say of it what the kept weights of the best step do."""
        self.close()
        lines = [{name: value for name, value in line.items() if name != key} for line in self.kept]
        if best is not None:
            step, _, meta = best
            lines = [line for line in lines if line["step"] != step] + [{"step": step, key: meta[key]}]
        self.kept = sorted(lines, key=lambda line: line["step"])
        self._write()

    def append(self, line: dict[str, Any]) -> None:
        text = json.dumps(line).encode() + b"\n"
        self.kept.append(line)
        self._hash.update(text)
        self._file.write(text)
        self._file.flush()

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
