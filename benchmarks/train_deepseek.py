"""Training steps of a small DeepSeek-V3 against transformers, and what its mixture of experts costs us.

11.8M parameters, 8 rows of 256 tokens, AdamW, clipping. Farthing computes in the dtype it chooses here with
float32 master weights, with the balance loss and the bias update that transformers leaves out. The peer is
`DeepseekV3ForCausalLM` with torch's AdamW, in whichever of its expert and attention implementations and
precisions is fastest here. Both start from the same weights, their routers balanced beforehand, and see the
same batches; the losses are compared with the float32 peer's. The second line sets Farthing's own dense Llama
with as many active parameters beside it: the ratio is what the mixture and the latents cost a step.
"""

from __future__ import annotations

import farthing  # noqa: F401  # isort: skip

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from side_by_side import Phase, compare, options, profile, say
from torch import Tensor, nn
from train import ADAMW_BYTES, BETAS, CLIP, DECAY, LENGTH, batch, probe
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from farthing.base.device import choose, has_bfloat16
from farthing.cost.flops import causal_pairs, forward_flops, parameters
from farthing.model import Routing, Segments, update_biases
from farthing.train.losses import next_token_losses
from farthing.train.optim import MasterWeights
from farthing.weights import load_decoder, save_decoder
from farthing.weights.folder import read_config

ROWS = 8
LR = 1e-3
STEPS = 3  # a timed run
PRECISIONS = ("bf16", "fp32", "autocast") if has_bfloat16("cpu") else ("fp32",)
EXPERTS = ("eager", "grouped_mm")
ATTENTION = ("sdpa", "eager")
REFERENCE = ("fp32", "grouped_mm", "sdpa")


def main() -> None:
    """Measure both lines."""
    args = options(__doc__ or "", 5)
    with tempfile.TemporaryDirectory() as folder:
        mixture, dense = Path(folder) / "deepseek", Path(folder) / "llama"
        _models(mixture, dense)
        _against_transformers(mixture, args)
        if not args.profile:
            _against_dense(mixture, dense, args)


def _models(mixture: Path, dense: Path) -> None:
    torch.manual_seed(0)
    shared: dict[str, Any] = {
        "vocab_size": 3584,
        "hidden_size": 256,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": False,
    }
    DeepseekV3ForCausalLM(
        DeepseekV3Config(
            **shared,
            intermediate_size=512,
            moe_intermediate_size=128,
            first_k_dense_replace=1,
            n_routed_experts=16,
            num_experts_per_tok=4,
            n_shared_experts=1,
            n_group=1,
            topk_group=1,
            q_lora_rank=128,
            kv_lora_rank=64,
            qk_nope_head_dim=32,
            qk_rope_head_dim=16,
            v_head_dim=32,
            num_mtp_layers=0,
        )
    ).save_pretrained(mixture)
    _balance(mixture)
    LlamaForCausalLM(LlamaConfig(**shared, intermediate_size=544)).save_pretrained(dense)


@torch.no_grad()
def _balance(folder: Path) -> None:
    """Move the routers' corrections until the experts' loads are what they are in the middle of a run: with a fresh
    router the busiest expert has several times the mean. The weights stay, and both sides read the corrections."""
    decoder, hf = load_decoder(folder), read_config(folder)
    segments = Segments([(LENGTH, ())] * ROWS)
    for step in range(120):
        routing = Routing()
        ids = batch(hf["vocab_size"], ROWS, step % 6)[:, :-1].flatten()
        decoder.hidden(ids, segments.positions(), segments, routing)
        update_biases(decoder, routing.loads, 0.02 * 0.97**step)
    save_decoder(decoder, hf, folder, tokenizer_from=None)


class _Ours:
    """Farthing's side: a language-model step with what DeepSeek-V3's training adds to it."""

    def __init__(self, folder: Path) -> None:
        self.hf: dict[str, Any] = json.loads((folder / "config.json").read_text())
        self.decoder = load_decoder(folder, choose("cpu").torch_dtype, stored=torch.bfloat16).train()
        self.weights = MasterWeights(self.decoder, "adamw", LR, BETAS, DECAY)
        self.imbalance: list[float] = []  # the busiest expert's load by the mean, layer by layer

    def step(self, ids: Tensor) -> float:
        rows, length = ids.shape[0], ids.shape[1] - 1
        segments = Segments([(length, ())] * rows)
        routing = Routing(lengths=[length] * rows, balance=1e-4)
        hidden = self.decoder.hidden(ids[:, :-1].flatten(), segments.positions(), segments, routing)
        loss = next_token_losses(hidden, self.decoder.head.weight, ids[:, 1:].flatten()).mean()
        (loss if routing.loss is None else loss + routing.loss).backward()
        self.weights.clip(CLIP)
        self.weights.step(LR)
        update_biases(self.decoder, routing.loads, 1e-3)
        self.imbalance = [
            round(float(load.max() / load.float().mean()), 2) for load in routing.loads.values()
        ]
        return float(loss.detach())


class _Peer:
    """transformers' model and torch's optimizer."""

    def __init__(self, folder: Path, precision: str, experts: str, attention: str) -> None:
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self.model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, experts_implementation=experts, attn_implementation=attention
        ).train()
        decayed = [p for p in self.model.parameters() if p.dim() > 1]
        plain = [p for p in self.model.parameters() if p.dim() <= 1]
        groups = [{"params": decayed, "weight_decay": DECAY}, {"params": plain, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, fused=True)
        self.autocast = precision == "autocast"

    def step(self, ids: Tensor) -> float:
        targets = ids[:, 1:].contiguous()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            loss = self.model(ids[:, :-1], labels=targets, shift_labels=targets, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())


def _against_transformers(folder: Path, args: argparse.Namespace) -> None:
    mine = _Ours(folder)
    rows = 1 if args.quick else ROWS
    batches = [batch(mine.hf["vocab_size"], rows, step) for step in range(6)]
    if args.profile:
        profile("train_deepseek", lambda: mine.step(batches[0]))
        return
    tried: dict[tuple[str, str, str], float] = {}
    reference: list[float] = []
    for precision in PRECISIONS:
        for experts in EXPERTS:
            for attention in ATTENTION:
                variant = (precision, experts, attention)
                count = len(batches) if variant == REFERENCE else 3
                tried[variant], losses = probe(_Peer(folder, *variant).step, batches[:count])
                reference = losses if variant == REFERENCE else reference
    chosen = min(tried, key=lambda variant: tried[variant])
    losses = [mine.step(ids) for ids in batches]
    apart = max(abs(a - b) / b for a, b in zip(losses, reference, strict=True))
    say(f"losses {[round(x, 3) for x in losses]}, the reference's {[round(x, 3) for x in reference]}")
    steps = 1 if args.quick else STEPS
    peer, counts = _Peer(folder, *chosen), parameters(mine.hf)
    compare(
        "train_deepseek/11.8m",
        "tokens/s",
        lambda: [mine.step(batches[i]) for i in range(steps)],
        lambda: [peer.step(batches[i]) for i in range(steps)],
        f"transformers + torch AdamW ({', '.join(chosen)})",
        runs=args.runs,
        amount=rows * LENGTH * steps,
        work=_work(mine.hf, rows, steps),
        details={
            "parameters": counts.total,
            "active": counts.active,
            "busiest_expert_by_mean": mine.imbalance,
            "tokens_a_step": rows * LENGTH,
            "losses_apart": round(apart, 4),
            "peers_tried_s": {", ".join(variant): round(value, 3) for variant, value in tried.items()},
        },
    )


def _against_dense(mixture: Path, dense: Path, args: argparse.Namespace) -> None:
    mine, other = _Ours(mixture), _Ours(dense)
    rows = 1 if args.quick else ROWS
    batches = [batch(mine.hf["vocab_size"], rows, step) for step in range(4)]
    compare(
        "train_deepseek/moe_tax",
        "tokens/s",
        lambda: [mine.step(ids) for ids in batches],
        lambda: [other.step(ids) for ids in batches],
        "Farthing, dense Llama with as many active parameters",
        runs=args.runs,
        amount=rows * LENGTH * len(batches),
        work=_work(mine.hf, rows, len(batches)),
        details={
            "active": parameters(mine.hf).active,
            "dense": parameters(other.hf).total,
            "gflop_a_token": [
                round(3 * forward_flops(s.hf, 256, causal_pairs(256), 256) / 256e9, 4) for s in (mine, other)
            ],
        },
    )


def _work(hf: dict[str, Any], rows: int, steps: int) -> list[Phase]:
    tokens = rows * LENGTH
    flops = 3 * forward_flops(hf, tokens, rows * causal_pairs(LENGTH), tokens)
    return [Phase(flops, 0, steps), Phase(0, parameters(hf).total * ADAMW_BYTES, steps)]


if __name__ == "__main__":
    main()
