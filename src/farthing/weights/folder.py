"""Model folders on disk: ordinary Hugging Face directories, read carefully and written whole or not at all.

Only safetensors is read, which holds numbers and nothing executable. Pickled weights are refused by name.
"""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from farthing.base.errors import UserError
from farthing.base.files import new_folder, read_json, write_json

if TYPE_CHECKING:
    from torch import Tensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "tiktoken.model",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
_VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model",
    "tiktoken.model",
    "vocab.json",
)  # any one of them makes a tokenizer
_MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors format


# ---------------------------------------------------------------- reading


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a model folder. Raises UserError when it is missing or broken."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give a model folder that holds config.json")
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder} holds no config.json, so it is not a model folder; give the folder that has one"
        )
    return read_json(folder / "config.json")


def tensor_files(folder: Path) -> dict[str, Path]:
    """Location of each tensor in the folder: name -> safetensors file; every file is checked for completeness.

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
                f"{folder / INDEX} names {shard!r}, which is not a safetensors file in the same folder"
            )
        if shard not in headers:
            if not (folder / shard).is_file():
                raise UserError(f"{folder / shard} is missing, though the index names it; download it again")
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
    """The tensors in a safetensors file's header, after checking the file's length against it."""
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
    """Write a model folder; returns its path once every byte is on disk.

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
    """Write tensors as they come, with at most one shard in memory: one file, or shards and their index."""
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


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy tokenizer, chat template and generation_config.json. Raises UserError when `source` has no
    tokenizer.
    """
    from farthing.weights import tokenizer

    require_tokenizer(source)
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    tokenizer.finish_copy(source, target)


def require_tokenizer(folder: Path) -> None:
    """Raise UserError unless the folder holds a tokenizer."""
    if not any((Path(folder) / name).is_file() for name in _VOCABULARIES):
        raise UserError(
            f"{folder} has no tokenizer.json; copy the tokenizer files of the model it came from into it"
        )
