"""Export a model folder as one .gguf for llama.cpp: the Llama family and DeepSeek's (`deepseek2`).

What a .gguf cannot express is refused, not approximated. Tensors are written one at a time; the file appears whole
or not at all.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from farthing.base.errors import UserError
from farthing.base.files import is_disk_full, new_file
from farthing.model import ModelConfig, Rope
from farthing.model.rotary import frequencies
from farthing.weights.check import check, require_finite
from farthing.weights.folder import read_config
from farthing.weights.fp8 import Weights
from farthing.weights.gguf_deepseek import Planned, latent_sizes, latent_tensors
from farthing.weights.gguf_q4k import quantise_q4_k
from farthing.weights.gguf_read import tensor_table
from farthing.weights.gguf_vocabulary import tokenizer_metadata
from farthing.weights.layouts import family

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

TYPES = ("f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_k", "q4_1", "q4_0", "f32")
_OUTER = ("token_embd.weight", "output.weight")  # q8_0 in a file of fewer bits, which they would harm most
_PIECE = 16_000_000  # weights converted at a time: bounds the float32 copies to 64 MB
_ALIGNMENT = 32  # bytes; tensors in a .gguf start at multiples of it
_F16_LARGEST = 65504.0
_LARGER = {"Q4_K": ("Q5_0",)}  # tried where blocks do not divide a row, f16 after them
_FILE_TYPES = {
    "f32": "ALL_F32",
    "q4_k": "MOSTLY_Q4_K_S",
}  # llama.cpp's names that are not MOSTLY_ and the type


def export_gguf(folder: Path, path: Path, kind: str = "f16") -> list[str]:
    """Write the model folder as the file `path`; returns what the file leaves out, one sentence each.

    `kind` is one of `TYPES`. Vectors and routers are always float32. Rows that its blocks do not divide get the
    next larger type whose blocks do.

    Raises:
        UserError: for a family, setting or tokenizer that llama.cpp cannot express, tensors that do not fit the
        config, a number too large for f16 where a type is made of that, or a full disk.
    """
    assert kind in TYPES
    kind_of_model = family(read_config(folder))
    architecture = ARCHITECTURES.get(kind_of_model)
    if architecture is None:
        raise UserError(
            f"{folder}: a .gguf of a {kind_of_model!r} model is not supported; "
            f"supported are {', '.join(ARCHITECTURES)}"
        )
    if path.suffix != ".gguf" or path.is_dir():
        raise UserError(f"{path} is not a name for the file; give one that ends in .gguf")
    model = check(folder)
    config, weights = model.config, model.weights
    vocabulary, differing = tokenizer_metadata(folder, config.vocab_size)
    metadata = {
        "general.name": folder.resolve().name,
        **_licence(folder),
        **vocabulary,
        **{f"{architecture}.{key}": value for key, value in sizes(config, architecture).items()},
    }
    plan = tensors(config, architecture)
    notes = [*_left_out(folder, weights, plan, config), *_undivided(plan, kind)]
    _write(path, architecture, metadata, plan, weights, config, kind)
    return notes + differing


def _licence(folder: Path) -> dict[str, str]:
    from farthing.weights.sources import Source

    licence = Source("folder", str(folder), folder).license
    return {"general.license": licence} if licence else {}


def _left_out(folder: Path, weights: Weights, plan: list[Planned], config: ModelConfig) -> list[str]:
    """What the file leaves out or means otherwise. Raises UserError for a tensor that has no place in it."""
    used = {source for planned in plan for source in planned.sources}
    modules = {f"model.layers.{config.num_layers + depth}." for depth in range(config.mtp_depth)}
    left = [name for name in weights if name not in used and not name.endswith("rotary_emb.inv_freq")]
    predicting = [name for name in left if name.startswith(tuple(modules))]
    odd = sorted(set(left) - set(predicting) - ({"lm_head.weight"} if config.tied_head else set()))
    if odd:
        raise UserError(f"{folder}: tensor {odd[0]!r} has no place in a .gguf of this family")
    notes = []
    if predicting:
        notes.append(
            f"left out: {len(predicting)} tensors of {config.mtp_depth} prediction module(s) (MTP), which this "
            "architecture of llama.cpp is exported without"
        )
    if config.window is not None and config.window < config.max_positions:
        notes.append(
            f"differs: this architecture of llama.cpp has no sliding window, so the file's context is the window's "
            f"{config.window:,} tokens, not {config.max_positions:,}"
        )
    if config.mla and not math.isclose(config.rms_eps, 1e-6):
        notes.append(
            f"differs: llama.cpp norms the latents with rms_norm_eps {config.rms_eps:g}, this model with 1e-06"
        )
    return notes


def _undivided(plan: list[Planned], kind: str) -> list[str]:
    """Which matrices are of another type than asked for, since blocks do not divide their rows."""
    others: dict[str, list[int]] = {}
    for planned in plan:
        if (one := _type(planned, kind)) != _wanted(planned, kind):
            others.setdefault(one.name.lower(), []).append(planned.shape[-1])
    matrices = sum(len(planned.shape) > 1 for planned in plan)
    return [
        f"differs: {len(columns)} of {matrices} matrices are {other}: {kind} has no blocks that divide rows of "
        f"{', '.join(f'{n:,}' for n in sorted(set(columns)))}"
        for other, columns in others.items()
    ]


# ---- writing ----


def _write(
    path: Path,
    architecture: str,
    metadata: dict[str, Any],
    plan: list[Planned],
    weights: Weights,
    config: ModelConfig,
    kind: str,
) -> None:
    from gguf import GGUFWriter, LlamaFileType, quant_shape_to_byte_shape

    types = [_type(planned, kind) for planned in plan]
    shapes = [
        tuple(quant_shape_to_byte_shape(planned.shape, one)) for planned, one in zip(plan, types, strict=True)
    ]
    divisors = rope_divisors(config)
    path.parent.mkdir(parents=True, exist_ok=True)
    needed = sum(math.prod(shape) + _ALIGNMENT for shape in shapes)
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        raise UserError(f"no room on the disk for {path}: it needs {needed:,} bytes and {free:,} are free")
    try:
        with new_file(path) as partial:
            writer = GGUFWriter(partial, architecture)
            writer.add_file_type(LlamaFileType[_FILE_TYPES.get(kind, f"MOSTLY_{kind.upper()}")])
            for key, value in metadata.items():
                _add(writer, key, value)
            if divisors is not None:
                writer.add_tensor_info("rope_freqs.weight", divisors.shape, divisors.dtype, divisors.nbytes)
            for planned, one, shape in zip(plan, types, shapes, strict=True):
                writer.add_tensor_info(
                    planned.name, shape, np.dtype(np.uint8), math.prod(shape), raw_dtype=one
                )
            with closing(writer):
                writer.write_header_to_file()
                writer.write_kv_data_to_file()
                writer.write_ti_data_to_file()
                if divisors is not None:
                    writer.write_tensor_data(divisors)
                for planned, one, shape in zip(plan, types, shapes, strict=True):
                    writer.write_tensor_data(_converted(planned, weights, one, shape))
    except OSError as error:
        if is_disk_full(error):
            raise UserError(
                f"no room on the disk for {path}; free some space or choose another place"
            ) from None
        raise


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif value:  # the format has no empty lists
        writer.add_array(key, value)


def _wanted(planned: Planned, kind: str) -> GGMLQuantizationType:
    """The tensor's type if its rows can be divided into blocks of any size."""
    from gguf import GGMLQuantizationType

    if len(planned.shape) == 1 or planned.name.endswith("ffn_gate_inp.weight"):
        return GGMLQuantizationType.F32
    narrow = kind.startswith(("q4", "q5")) and planned.name in _OUTER
    return GGMLQuantizationType["Q8_0" if narrow else kind.upper()]


def _type(planned: Planned, kind: str) -> GGMLQuantizationType:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    wanted = _wanted(planned, kind)
    for one in (wanted, *(GGMLQuantizationType[name] for name in _LARGER.get(wanted.name, ()))):
        if planned.shape[-1] % GGML_QUANT_SIZES[one][0] == 0:
            return one
    return GGMLQuantizationType.F16


def _converted(
    planned: Planned, weights: Weights, kind: GGMLQuantizationType, shape: tuple[int, ...]
) -> np.ndarray[Any, Any]:
    """The tensor's bytes in the file, [..., bytes of a row]; only it and one source are in memory."""
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    wide = kind in (GGMLQuantizationType.F32, GGMLQuantizationType.BF16)
    out = np.empty((math.prod(shape[:-1]), shape[-1]), dtype=np.uint8)
    step = max(1, _PIECE // planned.shape[-1])
    row = 0
    for source in planned.sources:
        tensor = weights[source]
        require_finite(tensor, source)
        rows = (tensor if planned.turn is None else planned.turn(tensor)).reshape(-1, planned.shape[-1])
        for start in range(0, len(rows), step):
            piece = rows[start : start + step].float().contiguous().numpy()
            if not wide and np.abs(piece).max(initial=0.0) > _F16_LARGEST:
                raise UserError(
                    f"tensor {source!r} holds a number beyond f16's {_F16_LARGEST:g}; use --type bf16"
                )
            four_bits = kind == GGMLQuantizationType.Q4_K
            with np.errstate(all="ignore"):  # gguf divides by subnormal steps, which are 0 in the file
                written = quantise_q4_k(piece) if four_bits else quantize(piece, kind).view(np.uint8)
            out[row : row + len(piece)] = written.reshape(len(piece), -1)
            row += len(piece)
    assert row == len(out)
    return out.reshape(shape)


ARCHITECTURES = {
    "llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3",
    "deepseek_v2": "deepseek2", "deepseek_v3": "deepseek2",
}  # fmt: skip


def sizes(config: ModelConfig, architecture: str) -> dict[str, Any]:
    """The file's keys under the architecture's name.

    Raises:
        UserError: for a setting that llama.cpp cannot express.
    """
    if config.o_bias or config.mlp_bias or config.qkv_bias != (architecture == "qwen2"):
        raise UserError(f"config.json: the biases it asks for are not part of llama.cpp's {architecture}")
    keys: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        # llama.cpp has no windows in these architectures; in contexts that a window holds whole they change nothing
        "context_length": min(config.max_positions, config.window or config.max_positions),
        "embedding_length": config.hidden_size,
        "block_count": config.num_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": 1 if config.mla else config.num_kv_heads,
        "attention.key_length": config.mla.cache_dim if config.mla else config.head_dim,
        "attention.value_length": config.mla.kv_lora_rank if config.mla else config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_eps),
        "rope.dimension_count": config.rotary_dim,
        "rope.freq_base": config.rope.theta,
    }
    return keys | _stretching(config) | latent_sizes(config)


def _stretching(config: ModelConfig) -> dict[str, Any]:
    """Keys for scaled positions; llama3's scaling becomes a tensor instead (`rope_divisors`)."""
    rope = config.rope
    if rope.kind in ("default", "llama3"):
        return {}
    keys: dict[str, Any] = {"rope.scaling.type": rope.kind, "rope.scaling.factor": rope.factor}
    if rope.kind == "linear":
        return keys
    keys |= {
        "rope.scaling.original_context_length": rope.original_max_positions,
        "rope.scaling.yarn_beta_fast": rope.beta_fast,
        "rope.scaling.yarn_beta_slow": rope.beta_slow,
    }
    # llama.cpp multiplies cosine and sine by m(1) where scores are left alone, and by 1 where they get m squared.
    log_factor = math.log(max(rope.factor, 1.0))
    if config.mla:
        usual = 1.0
        mscale = (math.sqrt(rope.score_scale) - 1) / (0.1 * log_factor) if log_factor else 1.0
        keys["rope.scaling.yarn_log_multiplier"] = 0.1 * mscale  # [llama.cpp#17945] a tenth of mscale_all_dim
    else:
        usual = 1 + 0.1 * log_factor
    if not math.isclose(rope.table_scale, usual, rel_tol=1e-6):
        raise UserError(
            f"config.json: yarn that multiplies the rotation by {rope.table_scale:.4g} cannot be said in a .gguf, "
            f"only {usual:.4g}; mscale and mscale_all_dim must be equal"
        )
    return keys


def rope_divisors(config: ModelConfig) -> np.ndarray[Any, Any] | None:
    """Divisor of each frequency, [R/2] float32: llama3's scaling as a .gguf stores it."""
    if config.rope.kind != "llama3":
        return None
    plain = frequencies(Rope(theta=config.rope.theta), config.rotary_dim)
    divisors: np.ndarray[Any, Any] = (plain / frequencies(config.rope, config.rotary_dim)).numpy()
    return divisors.astype(np.float32)


def tensors(config: ModelConfig, architecture: str) -> list[Planned]:
    """The file's tensors in order, `rope_divisors` apart."""
    return list(latent_tensors(config) if config.mla else _plain_tensors(config, architecture))


def _plain_tensors(config: ModelConfig, architecture: str) -> Iterator[Planned]:
    """The Llama family's tensors; llama.cpp's llama rotates neighbouring rows of q and k, the Qwens as we do."""
    fields = {
        "hidden_size": config.hidden_size, "intermediate_size": config.intermediate_size,
        "head_dim": config.head_dim, "num_attention_heads": config.num_heads, "vocab_size": config.vocab_size,
        "num_key_value_heads": config.num_kv_heads, "num_hidden_layers": config.num_layers,
        "tie_word_embeddings": config.tied_head,
    }  # fmt: skip
    for name, (source, shape) in tensor_table(fields, architecture).items():
        turn = None
        if architecture == "llama" and name.endswith(("attn_q.weight", "attn_k.weight")):
            heads = config.num_heads if "attn_q" in name else config.num_kv_heads
            turn = _neighbours(heads)
        yield Planned(name, shape, (source,), shape, turn)


def _neighbours(heads: int) -> Callable[[Tensor], Tensor]:
    """Undoes `gguf.halves`: the rows of each head in the order 0, R/2, 1, R/2 + 1 and so on."""

    def turn(rows: Tensor) -> Tensor:
        per_head = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
        return per_head.transpose(1, 2).reshape(rows.shape)

    return turn
