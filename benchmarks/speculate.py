"""Speculative against plain decoding of the same model: questions in its chat template, its own stop ids heeded.

Give the folder of a model with prediction modules. Without one a random network is measured, whose guesses are next to
never right: that shows what guessing costs, and nothing else. Both sides write the same tokens, but where rounding tips
a near-tie; the share that agrees is printed.
"""

from __future__ import annotations

import farthing  # noqa: F401  # isort: skip

import argparse
from typing import Any

from side_by_side import Phase, compare, options, profile, say

from farthing.base.device import choose
from farthing.base.errors import UserError
from farthing.cost.flops import parameters
from farthing.data.tokenizer import question_ids
from farthing.engine import Engine, Request, Sampling, load
from farthing.model import Decoder
from farthing.recipe import parse_tasks
from farthing.tasks.mixture import Mixture
from farthing.weights import decoder_config

RANDOM = {
    "model_type": "deepseek_v3", "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 704,
    "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 96,
    "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32, "n_routed_experts": 16,
    "num_experts_per_tok": 4, "moe_intermediate_size": 128, "n_shared_experts": 1, "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 1,
}  # fmt: skip


def main() -> None:
    """Measure each batch size asked for."""
    args = options(__doc__ or "", 5, _more)
    args.new = 8 if args.quick else args.new
    decoder, hf, stops, prompts = _trained(args) if args.source else _random(args)
    if not 1 <= args.guesses <= len(decoder.mtp):
        raise UserError(f"--guesses is {args.guesses}; the model has {len(decoder.mtp)} prediction modules")
    for batch in args.batches:
        _measure(decoder, hf, stops, prompts[:batch], args)


def _more(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", nargs="?", help="run or model folder; a random network without it")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16], help="batch sizes (default 1 16)")
    parser.add_argument("--guesses", type=int, default=1, help="tokens guessed a step (default 1)")
    parser.add_argument("--new", type=int, default=128, help="most new tokens of a sample (default 128)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default 0)")
    parser.add_argument("--tasks", default="chain_sum", help="what to ask, as in farthing eval")


def _trained(args: argparse.Namespace) -> tuple[Decoder, dict[str, Any], frozenset[int], list[list[int]]]:
    model = load(args.source, device="cpu")
    items = Mixture(parse_tasks(args.tasks), seed=0).held_out(max(args.batches), set())
    prompts = [question_ids(model.tokenizer, item.question, "{question}", None) for item in items]
    return model.decoder, model.hf_config, model.tokenizer.stop_ids, prompts


def _random(args: argparse.Namespace) -> tuple[Decoder, dict[str, Any], frozenset[int], list[list[int]]]:
    hf = {**RANDOM, "num_nextn_predict_layers": args.guesses}
    decoder = Decoder(decoder_config(hf)).to(choose("cpu").torch_dtype)
    decoder.init_weights(seed=0)
    return decoder.eval(), hf, frozenset(), [[row + 1] * 24 for row in range(max(args.batches))]


def _measure(
    decoder: Decoder,
    hf: dict[str, Any],
    stops: frozenset[int],
    prompts: list[list[int]],
    args: argparse.Namespace,
) -> None:
    batch = len(prompts)
    room = batch * (max(map(len, prompts)) + args.new + 16)
    fast, plain = (
        Engine(decoder, stops, max_batch=batch, cache_tokens=room, speculate=count)
        for count in (args.guesses, 0)
    )
    sampling = Sampling(max_new_tokens=args.new, temperature=args.temperature)
    requests = [Request(prompt, sampling, first_sample=number) for number, prompt in enumerate(prompts)]

    def write(engine: Engine) -> list[list[int]]:
        engine.cache.forget()
        return [samples[0].ids for samples in engine.generate(requests)]

    name = f"speculate/batch{batch}"
    if args.profile:
        profile(name, lambda: write(fast))
        return
    ours, theirs = write(fast), write(plain)
    tokens = sum(map(len, ours))
    same = sum(a == b for one, two in zip(ours, theirs, strict=True) for a, b in zip(one, two, strict=False))
    acceptance = [round(share, 3) for share in fast.done().acceptance]
    say(f"{name}: {tokens} tokens, {same / tokens:.1%} as in plain decoding, guesses right {acceptance}")
    # every guess right, and only what one token needs read in a pass: nothing can be faster
    passes = -(-max(map(len, ours)) // (1 + args.guesses))
    active = parameters(hf).active
    compare(
        name,
        "tokens/s",
        lambda: write(fast),
        lambda: write(plain),
        "plain decoding",
        runs=args.runs,
        amount=tokens,
        work=[Phase(2 * active * tokens / passes, active * decoder.embed.weight.element_size(), passes)],
        details={
            "source": args.source or "random",
            "guesses": args.guesses,
            "temperature": args.temperature,
            "tokens": tokens,
            "same_tokens": round(same / tokens, 4),
            "acceptance": acceptance,
            "tokens_per_pass": round(tokens / (tokens - sum(fast.work.accepted.values())), 3),
        },
    )


if __name__ == "__main__":
    main()
