"""Model folders on disk: ordinary Hugging Face directories, read carefully and written whole or not at all.

Only safetensors is read, which holds numbers and nothing executable. Pickled weights are refused by name.
"""

import json
import math
import operator
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from farthing.base.errors import UserError
from farthing.base.files import new_folder, read_json, require_file, write_json
from farthing.weights.chat_template import give_template

if TYPE_CHECKING:
    from torch import Tensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER, ADAPTER_WEIGHTS = (
    "adapter_config.json",
    "adapter_model.safetensors",
)  # of a LoRA folder, see `weights.adapter`
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
# any one of them makes a tokenizer
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "tiktoken.model", "vocab.json")
# bytes of a number of each type in a safetensors file
BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I64": 8, "I32": 4, "U8": 1, "BOOL": 1,
}  # fmt: skip
_MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors format


# ---------------------------------------------------------------- reading


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a model folder. Raises UserError when it is missing or broken."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give a model folder that holds config.json")
    require_file(folder / "config.json", "download it again")
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder} holds no config.json, so it is not a model folder; give the folder that has one"
        )
    return read_json(folder / "config.json")


@dataclass(frozen=True)
class Stored:
    """A tensor on disk, as its file's header describes it; `dtype` is safetensors' word, such as BF16."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def tensor_headers(folder: Path) -> dict[str, Stored]:
    """Each tensor of the folder by name; every file's length is checked against its header.

    Raises UserError, naming the file: no safetensors (pickled weights are refused), a shard missing, a shard
    cut short or damaged, an index that points outside the folder or does not name what its shards hold.
    """
    folder = Path(folder)
    for name in (SINGLE, INDEX):
        require_file(folder / name, "download it again")
    if (folder / SINGLE).is_file():
        return file_header(folder / SINGLE)
    if not (folder / INDEX).is_file():
        raise UserError(_no_weights(folder))
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{folder / INDEX} has no weight_map; download the file again")
    found: dict[str, Stored] = {}
    for shard in dict.fromkeys(map(str, weight_map.values())):
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise UserError(
                f"{folder / INDEX} names {shard!r}, which is not a safetensors file in the same folder"
            )
        require_file(folder / shard, "download it again")
        if not (folder / shard).is_file():
            raise UserError(f"{folder / shard} is missing, though the index names it; download it again")
        for name, stored in file_header(folder / shard).items():
            if weight_map.get(name) != shard:
                elsewhere = f"says is in {weight_map[name]}" if name in weight_map else "does not list"
                raise UserError(
                    f"{folder / shard} holds {name}, which the index {elsewhere}; download the folder again"
                )
            found[name] = stored
    for name, shard in weight_map.items():
        if name not in found:
            raise UserError(
                f"{folder / str(shard)} lacks {name}, which the index says it holds; download both again"
            )
    return {name: found[name] for name in weight_map}


def tensor_files(folder: Path) -> dict[str, Path]:
    """The safetensors file of each tensor. Raises UserError as `tensor_headers` does."""
    return {name: stored.file for name, stored in tensor_headers(folder).items()}


def read_tensors(folder: Path) -> Iterator[tuple[str, "Tensor"]]:
    """Each (name, tensor) of the folder on the CPU, read one at a time, shard by shard.

    Raises UserError as `tensor_files` does, before the first tensor is given.
    """
    names_of: dict[Path, list[str]] = {}
    for name, path in tensor_files(folder).items():
        names_of.setdefault(path, []).append(name)
    return _stream(names_of)


def read_file(path: Path) -> Iterator[tuple[str, "Tensor"]]:
    """Each (name, tensor) of one safetensors file on the CPU. Raises UserError for a damaged file."""
    return _stream({path: list(file_header(path))})


def same_weights(one: Path, other: Path) -> bool:
    """Whether the tensors that both folders name are equal, in the type of the other's.

    The smallest are compared first and the first difference ends it, so that it is quick where there is one.
    """
    import torch
    from safetensors import safe_open

    files, others = tensor_files(one), tensor_headers(other)
    common = sorted(files.keys() & others.keys(), key=lambda name: math.prod(others[name].shape))
    for name in common:
        with safe_open(files[name], "pt") as mine, safe_open(others[name].file, "pt") as theirs:
            expected = theirs.get_tensor(name)
            if not torch.equal(mine.get_tensor(name).to(expected.dtype), expected):
                return False
    return bool(common)


def _stream(names_of: dict[Path, list[str]]) -> Iterator[tuple[str, "Tensor"]]:
    from safetensors import SafetensorError, safe_open

    for path, names in names_of.items():
        try:
            with safe_open(path, framework="pt") as file:
                for name in names:
                    yield name, file.get_tensor(name)
        except SafetensorError as error:
            raise UserError(f"{path} is damaged ({error}); download it again") from None


def file_header(path: Path) -> dict[str, Stored]:
    """The tensors in a safetensors file's header, after checking that they fill the file and nothing more."""
    size = path.stat().st_size
    broken = UserError(f"{path} is cut short or damaged; download it again")
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(size - 8, _MAX_HEADER):
            raise broken
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            spans = sorted(tuple(map(operator.index, entry["data_offsets"])) for entry in header.values())
            found = {
                name: Stored(path, str(entry["dtype"]), tuple(map(operator.index, entry["shape"])))
                for name, entry in header.items()
            }
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
            raise broken from None
    at = 0
    for span in spans:
        if len(span) != 2 or span[0] != at or span[1] < at:
            raise broken
        at = span[1]
    if at != size - 8 - length:
        raise broken
    for name, stored in found.items():
        start, end = header[name]["data_offsets"]
        wide = BYTES.get(stored.dtype)
        if min(stored.shape, default=0) < 0 or (
            wide is not None and math.prod(stored.shape) * wide != end - start
        ):
            raise broken
    return found


def _no_weights(folder: Path) -> str:
    pickled = sorted(path.name for pattern in PICKLED for path in folder.glob(pattern))
    if (folder / ADAPTER).is_file():
        return (
            f"{folder} holds a LoRA adapter, not a whole model; merge it into its base first "
            f"(farthing.load({str(folder)!r}).save(FOLDER)), and give the merged folder"
        )
    if shards := sorted(folder.glob("*.safetensors")):
        return (
            f"{folder} holds {shards[0].name}{' and others' if len(shards) > 1 else ''} but no {INDEX}, which says "
            "what is in each; download the folder again"
        )
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
    chat_template: tuple[str, list[int]] | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> Path:
    """Write a model folder; returns its path once every byte is on disk.

    `tokenizer_from` is a model folder whose tokenizer, chat template and generation_config.json are copied.
    `chat_template` is one to have instead, and the ids on which generation stops with it.
    An older model folder of that path is replaced. Raises UserError when there is no room on the disk, when
    `tokenizer_from` has no tokenizer, or when the path holds something that is not a model folder.
    """
    needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    with new_folder(folder, needed) as temporary:
        if tokenizer_from is not None:
            copy_tokenizer(tokenizer_from, temporary)
        if chat_template is not None:
            give_template(temporary, *chat_template)
        write_tensors(temporary, tensors.items(), max_shard_bytes)
        write_json(temporary / "config.json", config)
    return Path(folder)


def write_tensors(
    folder: Path,
    tensors: "Iterable[tuple[str, Tensor]] | Iterable[tuple[str, np.ndarray]]",
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write tensors as they come, with at most one shard in memory: one file, or shards and their index.

    Arrays of uint16 are the bits of bfloat16, which numpy lacks; they are written without torch.
    """
    weight_map: dict[str, int] = {}
    shard: dict[str, Any] = {}
    count, held, total = 0, 0, 0

    def flush() -> None:
        nonlocal count, held
        _save(shard, folder / f"part-{count}")
        shard.clear()
        count, held = count + 1, 0

    for name, tensor in tensors:
        size = tensor.nbytes
        if shard and held + size > max_shard_bytes:
            flush()
        shard[name] = tensor if isinstance(tensor, np.ndarray) else tensor.detach().cpu().contiguous()
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


def _save(shard: dict[str, Any], path: Path) -> None:
    """Write a file of tensors, or of the bits of bfloat16."""
    metadata = {"format": "pt"}
    if not all(isinstance(values, np.ndarray) for values in shard.values()):
        from safetensors.torch import save_file

        save_file(shard, path, metadata)
        return
    from safetensors import TensorSpec, serialize_file

    bits = {name: np.ascontiguousarray(values) for name, values in shard.items()}
    assert all(values.dtype == np.uint16 for values in bits.values())
    specs = {
        name: TensorSpec(
            dtype="bfloat16", shape=values.shape, data_ptr=values.ctypes.data, data_len=values.nbytes
        )
        for name, values in bits.items()
    }
    serialize_file(specs, path, metadata)


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


def has_tokenizer(folder: Path) -> bool:
    """Whether the folder holds a tokenizer."""
    return any((Path(folder) / name).is_file() for name in _VOCABULARIES)


def require_tokenizer(folder: Path) -> None:
    """Raise UserError unless the folder holds a tokenizer."""
    if not has_tokenizer(folder):
        raise UserError(
            f"{folder} has no tokenizer.json; copy the tokenizer files of the model it came from into it"
        )
