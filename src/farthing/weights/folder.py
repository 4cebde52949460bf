"""Model folders on disk: an ordinary Hugging Face directory, read carefully and written whole or not at all.

Only safetensors is read: it holds numbers and nothing that runs. Pickled weights are refused by name.
"""

import errno
import fcntl
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from farthing.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")  # any one of them makes a tokenizer
_MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors format


# ---------------------------------------------------------------- reading


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a model folder. Raises UserError when it is missing or broken."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give a model folder that holds config.json")
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder} holds no config.json, so it is no model folder; give the folder that has one"
        )
    return read_json(folder / "config.json")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a model folder. Raises UserError when it is not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); download the file again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object; download the file again")
    return value


def tensor_files(folder: Path) -> dict[str, Path]:
    """Where each tensor of the folder lies: name -> safetensors file, every file checked to be whole.

    Raises UserError, naming the file: no safetensors (pickled weights are refused), a shard missing, a shard
    cut short, an index that points outside the folder or at a tensor that is not there.
    """
    folder = Path(folder)
    if (folder / SINGLE).is_file():
        return dict.fromkeys(_header(folder / SINGLE), folder / SINGLE)
    if not (folder / INDEX).is_file():
        raise UserError(_no_weights(folder))
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{folder / INDEX} has no weight_map; download the file again")
    headers: dict[str, set[str]] = {}
    for shard in weight_map.values():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise UserError(
                f"{folder / INDEX} names {shard!r}, which is no safetensors file in the same folder"
            )
        if shard not in headers:
            if not (folder / shard).is_file():
                raise UserError(f"{folder / shard} is missing though the index names it; download it again")
            headers[shard] = set(_header(folder / shard))
    for name, shard in weight_map.items():
        if name not in headers[shard]:
            raise UserError(
                f"{folder / shard} lacks {name}, which the index says it holds; download both again"
            )
    return {name: folder / shard for name, shard in weight_map.items()}


def tensor_names(folder: Path) -> list[str]:
    """The names of the folder's tensors, sorted. Raises UserError as `tensor_files` does."""
    return sorted(tensor_files(folder))


def read_tensors(folder: Path) -> Iterator[tuple[str, "Tensor"]]:
    """Each (name, tensor) of the folder on the CPU, read one at a time, shard by shard.

    Raises UserError as `tensor_files` does, before the first tensor is given.
    """
    names_of: dict[Path, list[str]] = {}
    for name, path in tensor_files(folder).items():
        names_of.setdefault(path, []).append(name)
    return _stream(names_of)


def _stream(names_of: dict[Path, list[str]]) -> Iterator[tuple[str, "Tensor"]]:
    from safetensors import SafetensorError, safe_open

    for path, names in names_of.items():
        try:
            with safe_open(path, framework="pt") as file:
                for name in names:
                    yield name, file.get_tensor(name)
        except SafetensorError as error:
            raise UserError(f"{path} is damaged ({error}); download it again") from None


def _header(path: Path) -> dict[str, Any]:
    """The tensors a safetensors file says it holds, once its length is found to agree with that."""
    size = path.stat().st_size
    broken = UserError(f"{path} is cut short or damaged; download it again")
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(size - 8, _MAX_HEADER):
            raise broken
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
            whole = bool(end == size - 8 - length)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
            raise broken from None
    if not whole:
        raise broken
    return header


def _no_weights(folder: Path) -> str:
    pickled = sorted(path.name for pattern in PICKLED for path in folder.glob(pattern))
    if pickled:
        return (
            f"{folder} holds its weights as {pickled[0]}, a pickle that can run code when it is opened; "
            "convert it to safetensors first (transformers' save_pretrained writes safetensors)"
        )
    return f"{folder} holds no {SINGLE} and no {INDEX}; give a folder with safetensors weights"


# ---------------------------------------------------------------- writing


def write_folder(
    folder: Path,
    tensors: "Mapping[str, Tensor]",
    config: dict[str, Any],
    tokenizer_from: Path | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> Path:
    """Write a model folder, and return its path once every byte is on disk.

    `tokenizer_from` is a model folder whose tokenizer, chat template and generation_config.json are copied.
    An older model folder of that path is replaced. Raises UserError when there is no room on the disk, when
    `tokenizer_from` has no tokenizer, or when the path holds something that is not a model folder.
    """
    needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    with new_folder(folder, needed) as temporary:
        if tokenizer_from is not None:
            copy_tokenizer(tokenizer_from, temporary)
        write_tensors(temporary, tensors.items(), max_shard_bytes)
        write_json(temporary / "config.json", config)
    return Path(folder)


def write_tensors(
    folder: Path, tensors: "Iterable[tuple[str, Tensor]]", max_shard_bytes: int = 5_000_000_000
) -> None:
    """Write tensors as they come, holding no more than a shard in memory: one file, or shards and their
    index.
    """
    from safetensors.torch import save_file

    weight_map: dict[str, int] = {}
    shard: dict[str, Tensor] = {}
    count, held, total = 0, 0, 0

    def flush() -> None:
        nonlocal count, held
        save_file(shard, folder / f"part-{count}", metadata={"format": "pt"})
        shard.clear()
        count, held = count + 1, 0

    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if shard and held + size > max_shard_bytes:
            flush()
        shard[name] = tensor.detach().cpu().contiguous()
        weight_map[name] = count
        held, total = held + size, total + size
    assert shard, "a model folder needs at least one tensor"
    flush()

    if count == 1:
        (folder / "part-0").rename(folder / SINGLE)
        return
    # The number of shards is part of each shard's name and known only now.
    files = [f"model-{number + 1:05d}-of-{count:05d}.safetensors" for number in range(count)]
    for number, file in enumerate(files):
        (folder / f"part-{number}").rename(folder / file)
    index = {name: files[number] for name, number in sorted(weight_map.items())}
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": index})


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON object as the ecosystem does: indented, UTF-8, a newline at the end."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy tokenizer, chat template and generation_config.json. Raises UserError when `source` has no
    tokenizer.
    """
    require_tokenizer(source)
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def require_tokenizer(folder: Path) -> None:
    """Raise UserError unless the folder holds a tokenizer."""
    if not any((Path(folder) / name).is_file() for name in _VOCABULARIES):
        raise UserError(
            f"{folder} has no tokenizer.json; copy the tokenizer files of the model it came from into it"
        )


@contextmanager
def new_folder(folder: Path, needed_bytes: int = 0) -> Iterator[Path]:
    """A folder to fill, which takes the name `folder` when the block ends well and vanishes when it does not.

    It is filled beside its final place, flushed to disk file by file and then renamed, so that `folder` is at
    every moment absent, the old model or the new one. Raises UserError when less than `needed_bytes` are
    free, when the disk runs full, or when `folder` exists and is not a model folder (which alone may be
    replaced).
    """
    folder = Path(folder).resolve()
    _check_replaceable(folder)
    _sweep(folder)
    temporary = folder.with_name(f".{folder.name}.partial-{secrets.token_hex(4)}")
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        if is_disk_full(error):
            raise UserError(_disk_full(folder, needed_bytes, 0)) from None
        raise UserError(f"{folder}: cannot be written ({error.strerror}); choose another place") from None
    free = shutil.disk_usage(folder.parent).free
    if free < needed_bytes:
        temporary.rmdir()
        raise UserError(_disk_full(folder, needed_bytes, free))
    lock = os.open(temporary, os.O_RDONLY)
    try:
        fcntl.flock(
            lock, fcntl.LOCK_EX
        )  # held while we live: tells another process's sweep to leave it alone
        yield temporary
        mode = temporary.stat().st_mode & 0o666  # what the umask grants; safetensors makes its files private
        for path in temporary.iterdir():
            path.chmod(mode)
            sync(path)
        os.fsync(lock)
        _replace(temporary, folder)
        sync(folder.parent)
    except BaseException as error:
        if is_disk_full(error):
            free = shutil.disk_usage(folder.parent).free
            raise UserError(_disk_full(folder, needed_bytes, free)) from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # gone already if it was renamed
        os.close(lock)


def _check_replaceable(folder: Path) -> None:
    """Replacing deletes, so nothing is replaced but an empty folder or a flat folder with a config.json."""
    if not folder.exists():
        return
    entries = list(folder.iterdir()) if folder.is_dir() else None
    is_model = (
        entries is not None and (folder / "config.json").is_file() and all(e.is_file() for e in entries)
    )
    if entries is None or (entries and not is_model):
        raise UserError(f"{folder} exists and is not a model folder; choose another place for the model")


def _replace(temporary: Path, folder: Path) -> None:
    if not folder.exists():
        temporary.rename(folder)
        return
    old = folder.with_name(f".{folder.name}.old-{secrets.token_hex(4)}")
    folder.rename(old)
    temporary.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _sweep(folder: Path) -> None:
    """Remove what a killed process left half-written for this folder: a partial nobody holds a lock on."""
    for partial in folder.parent.glob(f".{folder.name}.partial-*"):
        try:
            lock = os.open(partial, os.O_RDONLY)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(partial, ignore_errors=True)
        except OSError:
            pass
        finally:
            os.close(lock)


def sync(path: Path) -> None:
    """Have the system write a file, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_disk_full(error: BaseException) -> bool:
    """Whether the error means that a disk, or the share of it one may use, ran full."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    # safetensors writes from Rust and raises an error of its own, with the system's in its text
    return type(error).__name__ == "SafetensorError" and f"os error {errno.ENOSPC}" in str(error).lower()


def _disk_full(folder: Path, needed: int, free: int) -> str:
    return (
        f"no room on the disk for {folder}: it needs {needed:,} bytes and {free:,} are free; "
        "free some space or choose another place"
    )
