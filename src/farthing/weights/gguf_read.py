"""Import a .gguf of the llama family or of DeepSeek's as an ordinary Hugging Face folder in bfloat16.

The file's quantised blocks are expanded, its tensors get their Hugging Face names, and its metadata becomes
config.json, the tokenizer and the chat template. What cannot be converted faithfully is refused: a folder that
computes something other than its file would be worse than none.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from farthing.base.errors import UserError
from farthing.base.files import new_folder, write_json
from farthing.weights import gguf_deepseek
from farthing.weights.folder import write_tensors
from farthing.weights.gguf_expand import Expander, expander
from farthing.weights.gguf_file import GgufFile, Metadata, open_gguf
from farthing.weights.gguf_file import Tensor as GgufTensor
from farthing.weights.gguf_tokenizer import stop_ids, token_id, write_tokenizer

if TYPE_CHECKING:
    from torch import Tensor

_CLASSES = {
    "llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM",
    "deepseek2": "DeepseekV3ForCausalLM",
}  # fmt: skip
_LATENT = "deepseek2"
# Keys that `_config` reads. Any other is refused, since it may change the result.
_NUMBERS = {
    "vocab_size", "context_length", "embedding_length", "block_count", "feed_forward_length",
    "attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length",
    "attention.layer_norm_rms_epsilon", "rope.dimension_count", "rope.freq_base",
    "rope.scaling.factor", "rope.scaling.original_context_length",
    "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow",
}  # fmt: skip
_KNOWN_KEYS = _NUMBERS | {"rope.scaling.type", "rope.scaling.finetuned"}
# Keys with one harmless value, the only one accepted.
_NEUTRAL: dict[str, Any] = {
    "expert_count": 0, "expert_used_count": 0, "attention.causal": True, "rope.scaling.attn_factor": 1.0,
    "rope.scale_linear": 1.0, "logit_scale": 1.0, "embedding_scale": 1.0, "residual_scale": 1.0,
}  # fmt: skip
_ROPE_FREQUENCIES = "rope_freqs.weight"
_MOST = 1e12  # of any number in the metadata


def import_gguf(path: Path, folder: Path) -> Path:
    """Write the model in `path` (.gguf; architecture llama, qwen2, qwen3 or deepseek2) as the model folder `folder`.

    The folder appears whole or not at all. Raises UserError when the file is damaged, is of another
    architecture, holds something a Hugging Face folder of that family cannot express, or does not fit on the
    disk.
    """
    path = Path(path)
    file = open_gguf(path)
    metadata = file.metadata
    try:
        config = _config(file)
        latent = metadata["general.architecture"] == _LATENT
        names = _latent_table(config) if latent else tensor_table(config, config["model_type"])
        _check_tensors(file, names)
        parameters = sum(math.prod(shape) for _, shape in names.values())
        room = 2 * parameters + 100 * config["vocab_size"]
        with new_folder(folder, needed_bytes=room) as temporary, expander() as expand:
            write_tokenizer(metadata, temporary)
            write_json(temporary / "config.json", config)
            write_tensors(
                temporary, _latent(file, config, expand) if latent else _llama(file, names, config, expand)
            )
            (temporary / "README.md").write_text(_card(path, metadata), encoding="utf-8")
    except UserError as error:
        raise UserError(f"{path}: {error}") from error.__cause__
    return Path(folder)


def _config(file: GgufFile) -> dict[str, Any]:
    """config.json, from the file's metadata; keys for transformers before and after version 5."""
    metadata, tensors = file.metadata, file.tensors
    architecture = metadata.get("general.architecture")
    if architecture not in _CLASSES:
        raise UserError(f"architecture {architecture!r} is not one Farthing imports ({', '.join(_CLASSES)})")
    given = {
        name.removeprefix(f"{architecture}."): value
        for name, value in metadata.items()
        if name.startswith(f"{architecture}.")
    }
    latent = architecture == _LATENT
    numbers = _NUMBERS | (gguf_deepseek.NUMBERS if latent else set())
    known = numbers | _KNOWN_KEYS | ({"expert_weights_norm"} if latent else set())
    for key, value in given.items():
        if key not in known and not (key in _NEUTRAL and value == _NEUTRAL[key]):
            raise UserError(f"it sets {architecture}.{key} to {value!r}, which Farthing cannot convert")

        least = -1 if key in gguf_deepseek.MAY_BE_ZERO else 0
        if key in numbers and not (type(value) in (int, float) and least < value < _MOST):
            raise UserError(f"its {architecture}.{key} is {value!r} where one positive number belongs")

    def need(key: str) -> Any:
        if key not in given:
            raise UserError(f"its metadata lacks {architecture}.{key}; convert the model again")
        return given[key]

    heads, width = int(need("attention.head_count")), int(need("embedding_length"))
    head_dim = int(given.get("attention.key_length", width // heads))
    for key in ("attention.value_length", "rope.dimension_count") if not latent else ():
        if int(given.get(key, head_dim)) != head_dim:
            raise UserError(
                f"{architecture}.{key} is {given[key]}, not the {head_dim} of its keys: not supported"
            )
    embedding = tensors.get("token_embd.weight")
    if embedding is None:
        raise UserError("it lacks token_embd.weight; give a file with the whole model")
    if need("block_count") > len(tensors):
        raise UserError(f"its metadata promises {given['block_count']} layers for {len(tensors)} tensors")
    rope = _rope(given, tensors, head_dim)
    scaled = {key: value for key, value in rope.items() if key != "rope_theta"}
    stops = stop_ids(metadata)
    config: dict[str, Any] = {
        "architectures": [_CLASSES[architecture]],
        "model_type": architecture,
        "vocab_size": embedding.shape[0],
        "hidden_size": width,
        "intermediate_size": int(need("feed_forward_length")),
        "num_hidden_layers": int(need("block_count")),
        "num_attention_heads": heads,
        "num_key_value_heads": int(given.get("attention.head_count_kv", heads)),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": int(need("context_length")),
        "rms_norm_eps": _short(need("attention.layer_norm_rms_epsilon")),
        "rope_parameters": rope,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if rope["rope_type"] == "default" else scaled,
        "tie_word_embeddings": "output.weight" not in tensors,
        **(
            {"attention_bias": False, "mlp_bias": False}
            if architecture == "llama"
            else {"use_sliding_window": False}
        ),
        "bos_token_id": token_id(metadata, "bos"),
        "eos_token_id": stops[0] if stops else None,
        "pad_token_id": token_id(metadata, "padding"),
        "initializer_range": 0.02,
        "use_cache": True,
        "torch_dtype": "bfloat16",
        "dtype": "bfloat16",
    }
    if latent:
        config |= gguf_deepseek.latent_config(given, tensors)
        for key in ("head_dim", "use_sliding_window"):
            del config[key]
    return config


def _short(value: float) -> float:
    """A float32 of the file as the shortest decimal that rounds to it: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _rope(given: dict[str, Any], tensors: dict[str, GgufTensor], head_dim: int) -> dict[str, Any]:
    """`rope_parameters` of config.json: the base and the scaling to a longer context."""
    theta = _short(given.get("rope.freq_base", 10_000.0))
    kind = given.get("rope.scaling.type", "none")
    factor = _short(given.get("rope.scaling.factor", 1.0))
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if _ROPE_FREQUENCIES in tensors:
        if kind != "none":
            raise UserError(f"it scales its positions twice ({_ROPE_FREQUENCIES} and {kind}): not supported")
        divisors = np.asarray(tensors[_ROPE_FREQUENCIES].rows, dtype=np.float32)
        return rope | _llama3(divisors, theta, head_dim)
    if kind == "linear":
        return rope | {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        if "rope.scaling.original_context_length" not in given:
            raise UserError("it scales its positions by yarn without the original length; not supported")
        original = int(given["rope.scaling.original_context_length"])
        rope |= {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
        for name in ("beta_fast", "beta_slow"):
            if f"rope.scaling.yarn_{name}" in given:
                rope[name] = _short(given[f"rope.scaling.yarn_{name}"])
        if "rope.scaling.yarn_log_multiplier" in given:  # of DeepSeek: a tenth of mscale_all_dim
            mscale = _short(_short(given["rope.scaling.yarn_log_multiplier"]) * 10)
            rope |= {"mscale": mscale, "mscale_all_dim": mscale}
        return rope
    if kind != "none":
        raise UserError(f"it scales its positions by {kind!r}, which Farthing cannot convert")
    return rope


def _llama3(divisors: np.ndarray, theta: float, head_dim: int) -> dict[str, Any]:
    """Llama 3.1's scaling, recovered from the divisor of each frequency that llama.cpp stores instead.

    The rule (Llama 3.1's reference code): wavelengths below `original / high` stay, those above `original /
    low` are divided by `factor`, and between them the two are mixed in proportion. All released models keep
    low 1, high 4 and original 8192; the factor is the largest divisor. Anything that this does not reproduce
    is refused.
    """
    factor, low, high, original = float(divisors.max(initial=1.0)), 1.0, 4.0, 8192
    wavelength = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    kept = np.clip((original / wavelength - low) / (high - low), 0.0, 1.0)
    expected = 1 / ((1 - kept) / factor + kept)
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-3):
        raise UserError(
            f"its {_ROPE_FREQUENCIES} does not follow Llama 3.1's rule, the only one Farthing converts"
        )
    return {
        "rope_type": "llama3",
        "factor": _short(factor),
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def tensor_table(config: dict[str, Any], architecture: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The file's tensor names -> (Hugging Face name, shape) for the tensors of a model of this family."""
    width, inner, head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q_rows, kv_rows = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    layer: dict[str, tuple[str, tuple[int, ...]]] = {
        "attn_norm.weight": ("input_layernorm.weight", (width,)),
        "attn_q.weight": ("self_attn.q_proj.weight", (q_rows, width)),
        "attn_k.weight": ("self_attn.k_proj.weight", (kv_rows, width)),
        "attn_v.weight": ("self_attn.v_proj.weight", (kv_rows, width)),
        "attn_output.weight": ("self_attn.o_proj.weight", (width, q_rows)),
        "ffn_norm.weight": ("post_attention_layernorm.weight", (width,)),
        "ffn_gate.weight": ("mlp.gate_proj.weight", (inner, width)),
        "ffn_up.weight": ("mlp.up_proj.weight", (inner, width)),
        "ffn_down.weight": ("mlp.down_proj.weight", (width, inner)),
    }
    if architecture == "qwen2":
        layer["attn_q.bias"] = ("self_attn.q_proj.bias", (q_rows,))
        layer["attn_k.bias"] = ("self_attn.k_proj.bias", (kv_rows,))
        layer["attn_v.bias"] = ("self_attn.v_proj.bias", (kv_rows,))
    if architecture == "qwen3":
        layer["attn_q_norm.weight"] = ("self_attn.q_norm.weight", (head_dim,))
        layer["attn_k_norm.weight"] = ("self_attn.k_norm.weight", (head_dim,))
    vocabulary = (config["vocab_size"], width)
    names = {
        "token_embd.weight": ("model.embed_tokens.weight", vocabulary),
        "output_norm.weight": ("model.norm.weight", (width,)),
    }
    if not config["tie_word_embeddings"]:
        names["output.weight"] = ("lm_head.weight", vocabulary)
    for number in range(config["num_hidden_layers"]):
        for theirs, (ours, shape) in layer.items():
            names[f"blk.{number}.{theirs}"] = (f"model.layers.{number}.{ours}", shape)
    return names


def _check_tensors(file: GgufFile, names: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    for name, tensor in file.tensors.items():
        if name == _ROPE_FREQUENCIES:
            continue  # became part of config.json
        if name not in names:
            raise UserError(f"it holds a tensor {name}, which Farthing cannot convert")
        if tensor.shape != names[name][1]:
            raise UserError(
                f"its tensor {name} has the shape {tensor.shape}, not the {names[name][1]} its metadata implies"
            )
    if missing := sorted(set(names) - set(file.tensors)):
        raise UserError(f"it lacks the tensor {missing[0]}, and {len(missing) - 1} more; download it again")


def _latent_table(config: dict[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    from farthing.weights.layouts import decoder_config

    return {
        planned.name: (planned.sources[0], planned.shape)
        for planned in gguf_deepseek.latent_tensors(decoder_config(config))
    }


def _latent(file: GgufFile, config: dict[str, Any], expand: Expander) -> Iterator[tuple[str, "Tensor"]]:
    """Each tensor of a DeepSeek folder, in bfloat16, its correction in float32."""

    def whole(name: str) -> "Tensor":
        tensor = file.tensors[name]
        if name.endswith("exp_probs_b.bias"):
            return torch.from_numpy(np.array(tensor.rows, dtype=np.float32))
        return as_torch(tensor)

    def part(name: str, number: int) -> "Tensor":
        tensor = file.tensors[name]
        return as_torch(replace(tensor, shape=tensor.shape[1:], rows=tensor.rows[number]))

    def as_torch(tensor: GgufTensor) -> "Tensor":
        return torch.from_numpy(expand.bfloat16(tensor)).view(torch.bfloat16)

    import torch

    from farthing.weights.layouts import decoder_config

    yield from gguf_deepseek.unstacked(decoder_config(config), whole, part)


def _llama(
    file: GgufFile, names: dict[str, tuple[str, tuple[int, ...]]], config: dict[str, Any], expand: Expander
) -> Iterator[tuple[str, np.ndarray]]:
    """Each tensor under its Hugging Face name, as the bits of bfloat16, one at a time."""
    for tensor in file.tensors.values():
        if tensor.name == _ROPE_FREQUENCIES:
            continue
        name, _ = names[tensor.name]
        bits = expand.bfloat16(tensor)
        if config["model_type"] == "llama" and tensor.name.endswith(("attn_q.weight", "attn_k.weight")):
            heads = "num_attention_heads" if "attn_q" in tensor.name else "num_key_value_heads"
            bits = halves(bits, config[heads])
        yield name, bits


def halves(rows_RD: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's reordering of the rows of q and k (R rows, D columns), head by head.

    llama.cpp rotates neighbouring rows (0 with 1, 2 with 3), Hugging Face the two halves of a head (0 with
    R/2), and its converter for llama stores the rows in the order that makes the two agree.
    """
    rows, columns = rows_RD.shape
    pairs = rows_RD.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.transpose(0, 2, 1, 3).reshape(rows, columns)


def _card(path: Path, metadata: Metadata) -> str:
    """A README.md with the folder's origin and the licence that the file states."""
    licence = metadata.get("general.license")
    head = f"---\nlicense: {licence}\n---\n" if isinstance(licence, str) and licence.isprintable() else ""
    name = str(metadata.get("general.name", path.stem))
    return f"{head}# {name}\n\nExpanded to bfloat16 by Farthing from the quantised file {path.name}.\n"
