"""A model folder inspected: its size, cache, work and memory, and the engines that would misread it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from farthing.base.errors import UserError
from farthing.base.figures import bytes_, letters, plural
from farthing.cost.flops import CONVENTION, decode_flops, flops_per_token, parameters
from farthing.cost.memory import cache_bytes_per_token, check_latent, memory
from farthing.model import ModelConfig
from farthing.weights.check import check
from farthing.weights.folder import read_config
from farthing.weights.traps import TRAPS, Facts, facts, failed_traps

CONTEXT = 4096  # tokens; the length that work and memory are given at, unless the model's own is less
ACTIVE = "active: what one token passes through, embedding and head included; prediction modules apart"
GROUP = 4  # query heads to a key-value head, as in Llama 3 8B (arXiv:2407.21783 table 3)
READ = 50e9  # bytes of weights up to which their values are checked too
_BF16 = 2  # bytes
_ROUTER = ".mlp.gate."  # in the name of its tensors


def inspect(folder: Path) -> dict[str, Any]:
    """Everything `farthing inspect` prints.

    Raises:
        UserError: for a damaged folder, and a network that Farthing does not build, with the traps that are why.
    """
    try:
        model = check(folder)
    except UserError as error:
        why = "; ".join(
            f"trap {trap.number}: {said} ({trap.engines})"
            for trap, said in failed_traps(Facts(read_config(folder)))
        )
        raise UserError(f"{error}{f' [{why}]' if why else ''}") from error
    hf, config = {**model.layout.DEFAULTS[model.hf["model_type"]], **model.hf}, model.config
    files = {stored.file for stored in model.weights.headers.values()}
    disk_bytes = sum(path.stat().st_size for path in files)
    if disk_bytes <= READ:
        for _ in model.values():
            pass
    context = min(CONTEXT, config.max_positions)
    counted, found = parameters(hf), failed_traps(facts(model))
    train = memory(hf, kind="pretrain", micro_tokens=context, seq_len=context)
    serve = memory(hf, kind="serve", micro_tokens=context, seq_len=context)
    return {
        "folder": str(folder),
        "family": hf["model_type"],
        "layers": config.num_layers,
        "disk_bytes": disk_bytes,
        "values_checked": disk_bytes <= READ,
        "parameters": {
            "total": counted.total,
            "active": counted.active,
            "embedding": counted.embedding,
            "head": counted.head,
            "prediction_modules": counted.mtp,
            "convention": ACTIVE,
        },
        "cache": _cache(hf, config),
        "flops_per_token": {
            "context": context,
            "forward": flops_per_token(hf, context, "forward", mtp=False).model,
            "train": flops_per_token(hf, context).model,
            "decode": decode_flops(hf, context).model,
            "convention": CONVENTION,
        },
        "memory_bytes": {
            "context": context,
            "train": {**train.parts(), "total": train.total},
            "serve": {**serve.parts(), "total": serve.total},
            "convention": "one device, one sequence, bf16; training with AdamW, float32 masters, no recomputation",
        },
        "traps": [
            {
                "number": trap.number,
                "name": trap.name,
                "engines": trap.engines,
                "what": said,
                "farthing": trap.answer,
            }
            for trap, said in found
        ],
        "not_visible": [
            {"number": trap.number, "name": trap.name, "engines": trap.engines, "farthing": trap.answer}
            for trap in TRAPS
            if trap.check is None
            and any(_ROUTER in name for name in model.weights)  # the one such trap is a router's
        ],
    }


def _cache(hf: dict[str, Any], config: ModelConfig) -> dict[str, Any]:
    """Bytes a token leaves behind in bfloat16, and what keys and values of grouped queries would be."""
    found: dict[str, Any] = {"bytes_per_token": cache_bytes_per_token(hf), "kind": "grouped queries"}
    every = 2 * config.num_layers * config.num_heads * config.head_dim * _BF16
    if config.mla is None:
        return {**found, "key_value_heads": config.num_kv_heads, "every_head_bytes_per_token": every}
    kv_heads = max(1, config.num_heads // GROUP)
    wide = config.mla.nope_dim + config.mla.v_dim  # a head's key, were all of it in one part, and its value
    grouped = config.num_layers * kv_heads * wide * _BF16
    found |= {
        "kind": "latent",
        "gqa_key_value_heads": kv_heads,
        "gqa_bytes_per_token": grouped,
        "ratio_to_gqa": found["bytes_per_token"] / grouped,
        "larger_than_gqa": found["bytes_per_token"] > grouped,
        "refused": None,
    }
    try:
        check_latent(hf)
    except UserError as error:
        found["refused"] = str(error)
    return found


def inspection_text(found: dict[str, Any]) -> str:
    """The inspection as text."""
    size, cache, work, room = (
        found[key] for key in ("parameters", "cache", "flops_per_token", "memory_bytes")
    )
    modules = (
        f", and {letters(size['prediction_modules'])} in prediction modules"
        if size["prediction_modules"]
        else ""
    )
    rows = [
        (
            "model",
            f"{found['family']}, {plural(found['layers'], 'layer')}, {bytes_(found['disk_bytes'])} on disk",
        ),
        ("parameters", f"{letters(size['total'])}{modules}"),
        (
            "active",
            f"{letters(size['active'])} (embedding {letters(size['embedding'])}, "
            f"head {letters(size['head'])})",
        ),
        ("cache", f"{cache['bytes_per_token']:,} bytes a token in bf16, {cache['kind']}"),
    ]
    if cache["kind"] == "latent":
        times = "LARGER than" if cache["larger_than_gqa"] else "against"
        rows.append(
            (
                "",
                f"{times} {cache['gqa_bytes_per_token']:,} with {cache['gqa_key_value_heads']} key-value heads (GQA)",
            )
        )
        if cache["refused"]:
            rows.append(("", f"training refuses it: {cache['refused']}"))
    else:
        rows.append(
            (
                "",
                f"{cache['key_value_heads']} key-value heads; {cache['every_head_bytes_per_token']:,} with all",
            )
        )
    at = f"at {work['context']:,} tokens"
    rows += [
        (
            "FLOPs a token",
            f"{work['forward']:.3g} to read, {work['decode']:.3g} to write, {work['train']:.3g} to train",
        ),
        ("", f"{at}; {work['convention']}"),
        (
            "memory",
            f"{bytes_(room['serve']['total'])} to serve, {bytes_(room['train']['total'])} to train, {at}",
        ),
        ("", room["convention"]),
    ]
    lines = [f"{label:14} {text}".rstrip() for label, text in rows]
    lines += ["", f"falls into {len(found['traps'])} of {len(TRAPS)} known traps of other engines:"]
    lines += [f"  {trap['number']:2} {trap['engines']}: {trap['what']}" for trap in found["traps"]]
    lines += ["not visible in a folder:"] if found["not_visible"] else []
    lines += [
        f"  {t['number']:2} {t['engines']}: {t['name']}; Farthing {t['farthing']}"
        for t in found["not_visible"]
    ]
    return "\n".join(lines)
