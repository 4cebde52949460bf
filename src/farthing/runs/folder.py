"""The run directory: its lock, its recipe, and the errors it can raise.

Every file appears whole or not at all, so a run killed at any moment knows what is done.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from farthing.base.device import Place, choose, has_bfloat16
from farthing.base.errors import UserError
from farthing.base.files import sha256, strange, write
from farthing.base.limits import is_disk_full, named, unwritable
from farthing.base.schema import read_yaml
from farthing.recipe import Recipe, dump, load
from farthing.recipe.rewards import is_own
from farthing.tasks.data import DataTask, is_data, models_asked, rewards_of
from farthing.weights.check import check
from farthing.weights.sources import model_folder, resolve

# A loop of links, something else under the name of a file or folder, and what may not be read or written.
_UNUSABLE = {
    errno.ELOOP, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.EROFS,
}  # fmt: skip


def put_back(folder: Path) -> str:
    """What to do about a damaged file of a run that nothing else tells the contents of."""
    return f"put it back as it was, or give another --run-dir than {folder}"


@contextmanager
def room_on_disk(folder: Path) -> Iterator[None]:
    """Turn a disk that is full or refuses to be written, and a file of the run directory that cannot be used, into a
    UserError, wherever the run meets them."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _UNUSABLE and error.filename is not None:
            place = Path(os.fsdecode(error.filename)).absolute()
            if place.is_relative_to(folder.absolute()):
                raise UserError(
                    f"{error.filename} cannot be used ({error.strerror}); repair or remove it and run the same "
                    "command again"
                ) from error
        reason = unwritable(error)
        if reason is None:
            raise
        remedy = "free some" if is_disk_full(error) else "change that"
        raise UserError(f"{folder}: {reason}; {remedy} and run the same command again") from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock the run directory for this process; the lock ends with the process, however that ends."""
    recipe = folder / "recipe.yaml"
    if what := strange(recipe) or ("a folder" if recipe.is_dir() else None):
        raise UserError(f"{recipe} is {what}, not a file; remove it, or give another --run-dir")
    try:
        foreign = folder.is_dir() and not (folder / "recipe.yaml").exists()
        if foreign and any(entry.name not in ("lock", ".recipe.yaml.partial") for entry in folder.iterdir()):
            raise UserError(f"{folder} holds other files and is not a run directory; give another --run-dir")
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "lock").open("a")
    except OSError as error:
        raise UserError(f"cannot write to the run directory {folder}: {error.strerror}") from error
    with file:
        for last in (False, False, True):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if last:
                    raise UserError(
                        f"{folder} is in use by another run; wait for it or give another --run-dir"
                    ) from error
                time.sleep(
                    0.1
                )  # `farthing watch` may have asked for the lock, which takes it no longer than this
        yield


# Device and dtype may change between attempts; `place_of` decides. So may memory_gb, after memory ran out, and what
# does not change the weights.
_FREE = ("device", "dtype", "log_to")
_FREE_IN_STAGE = ("memory_gb", "stop_silent")


def origin(folder: Path) -> str:
    """A hash of the settings that a run was started with and keeps: what the run makes carries it, so that nothing made
    by another run is taken for it. Of the file as it stands, since a later version may read further keys from it."""
    started = read_yaml(folder / "recipe.yaml")
    kept = {key: value for key, value in started.items() if key not in _FREE}
    kept["stages"] = [
        {key: value for key, value in stage.items() if key not in _FREE_IN_STAGE}
        for stage in started["stages"]
    ]
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def claim(folder: Path, recipe: Recipe) -> None:
    """Write the recipe into a new run directory, or check that an old one has the same recipe."""
    path = folder / "recipe.yaml"
    if not (
        folder / "lineage.json"
    ).exists():  # nothing depends on the recipe yet, so a mistyped base can be corrected
        write(path, dump(recipe))
        return
    free: Any = dict.fromkeys(_FREE, True) | {"stages": {"__all__": set(_FREE_IN_STAGE)}}
    ours, theirs = (r.model_dump(mode="json", exclude=free) for r in (recipe, load(path)))
    if ours != theirs:
        raise UserError(
            f"{folder} was started with another {_first_difference(theirs, ours, '')}; "
            "give the same settings to continue it, or another --run-dir"
        )


def place_of(recipe: Recipe, earlier: Mapping[str, Any], folder: Path) -> Place:
    """Device and dtype of this attempt. The dtype is that of earlier attempts, or it would be another run.

    Args:
        earlier: run.json of the last attempt; empty for a new run.

    Raises:
        UserError: if the recipe asks for another dtype than the run was started with, or for none and this machine
        has no instructions for it; and as `device.choose`.
    """
    place = choose(recipe.device, recipe.dtype)
    started = (
        earlier.get("dtype", "bfloat16") if earlier else place.dtype
    )  # 0.1.0 knew no other, and did not record it
    if started == place.dtype:
        return place
    if recipe.dtype != "auto":
        raise UserError(
            f"{folder} was started in {started} and dtype is {place.dtype} now; leave dtype out, or give another "
            "--run-dir"
        )
    if started == "bfloat16" and not has_bfloat16(place.device):
        raise UserError(
            f"{folder} was started in bfloat16, and here {place.why}; continue it where it was started, or here all "
            "the same, slowly, with --dtype bfloat16"
        )
    return Place(place.device, started, "as the run was started")


def _first_difference(old: Any, new: Any, path: str) -> str:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *new]:
            if old.get(key) != new.get(key):
                return _first_difference(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for number, (a, b) in enumerate(zip(old, new, strict=True), 1):
            if a != b:
                return _first_difference(a, b, f"{path}.{number}")
    return f"{path} ({old!r}, now {new!r})"


def source_commit() -> str | None:
    """The commit of this source, if it is a git checkout."""
    try:
        asked = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=5
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return asked.stdout.strip() or None


def data_files(recipe: Recipe) -> dict[str, dict[str, str]]:
    """Hashes of the files of every data source, by the source's name; of a hub's there are none, but of the rows of one
    that tasks draw from.

    Raises:
        UserError: for a path that does not exist.
    """
    hashes: dict[str, dict[str, str]] = {}
    for name in (name for stage in recipe.stages for name in stage.paths):
        path = named(name)
        if name.startswith("hf:"):
            hashes[name] = {}
        elif what := strange(path):
            raise UserError(f"{name} is {what}; give a file, a folder of files or hf:owner/name")
        elif not path.exists():
            raise UserError(f"{name} does not exist; give a file, a folder of files or hf:owner/name")
        else:
            files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
            hashes[name] = {str(file.relative_to(path.parent)): sha256(file) for file in files}
    for task in data_tasks(recipe).values():
        hashes |= {entry["source"]: entry["sha256"] for entry in task.origins(license_too=False)}
    return hashes | {path: {Path(path).name: digest} for path, digest in reward_files(recipe).items()}


def rewards_used(recipe: Recipe) -> set[str]:
    """What pays in a recipe: verifiers by name, and functions of the user's own."""
    return {part.use for part in rewards_of(recipe)}


def judging_models(recipe: Recipe) -> list[dict[str, Any]]:
    """The models of this machine that rewards ask, each with its use and its identity, as the lineage has them.

    Raises:
        UserError: for a source that cannot be had, and a folder that is no such model.
    """
    found: list[dict[str, Any]] = []
    for name, use in models_asked(recipe).items():
        source = resolve(name)
        check(model_folder(source), scores=use == "reward_model")
        found.append({"use": use, **source.identity})
    return found


def reward_files(recipe: Recipe) -> dict[str, str]:
    """Hashes of the files with rewards of the user's own, by their paths. Raises UserError for one that is gone."""
    own = {use.rpartition(":")[0] for use in rewards_used(recipe) if is_own(use)}
    return {path: sha256(Path(path)) for path in sorted(own)}


def data_tasks(recipe: Recipe) -> dict[str, DataTask]:
    """Every task whose questions come from data, of the stages and the evaluation, by what the recipe says of it."""
    mixtures = [mixture for stage in recipe.stages for mixture in stage.mixtures]
    mixtures += [recipe.evaluation_tasks()] if recipe.evaluate else []
    found = {f"{name} {setting!r}": (name, setting) for tasks in mixtures for name, setting in tasks.items()}
    return {said: DataTask(*task) for said, task in found.items() if is_data(*task)}
