"""Decoding with latent attention: absorbed against expanded, after 4,096 tokens of context.

Both forms give the same tokens from the same cache. Expanded is what transformers does at every step: all heads' keys
and values are computed again from every cached latent. Absorbed attends to the latents themselves. The peer here is
Farthing's own network in the expanded form, so that nothing but the form differs; the details hold transformers' own
decoding time on the same weights, and the cache of each token beside that of a grouped-query cache.
"""

from __future__ import annotations

import farthing  # noqa: F401  # isort: skip

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from side_by_side import Phase, compare, options, profile, say, timed
from torch import Tensor
from transformers import AutoModelForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM

from farthing.cost.flops import forward_flops, parameters
from farthing.engine.cache import Decode, PagedCache
from farthing.model import Decoder
from farthing.model.latent import LatentAttention
from farthing.weights import load_decoder

CONTEXT = 4096
STEPS = 4  # a timed run
PAGE = 16


class _Expanded(Decode):
    """One new token for each sequence, with every head's keys and values computed from the cached latents."""

    def latent(self, attention: LatentAttention, q_BHD: Tensor, c_BL: Tensor, r_BR: Tensor) -> Tensor:
        store = self.cache.keys[attention.layer]
        self.cache._write(attention.layer, self.slots, torch.cat([c_BL, r_BR], -1)[:, None])
        entries = store[self.pages_BM].flatten(0, 2)
        k, v = attention.expand(*entries.split([c_BL.shape[-1], r_BR.shape[-1]], -1))
        k, v = (t.view(*self.shape, *t.shape[1:]).transpose(1, 2) for t in (k, v))
        v = F.pad(v, (0, k.shape[-1] - v.shape[-1]))  # the fused kernel's wish, and ten times as fast
        out = F.scaled_dot_product_attention(q_BHD[:, :, None], k, v, attn_mask=self.mask)
        return out[:, :, 0, : attention.widths.v_dim]


def main() -> None:
    """Measure both forms at batch 1 and 8."""
    args = options(__doc__ or "", 5)
    with tempfile.TemporaryDirectory() as folder:
        _model(Path(folder))
        for batch in (1, 8):
            _measure(Path(folder), batch, args)


def _model(folder: Path) -> None:
    """Four layers with DeepSeek-V2-Lite's attention (arXiv:2405.04434 appendix B) and dense feed-forward halves, as a
    model folder: what differs between the sides is attention, so nothing else should take the time."""
    torch.manual_seed(0)
    config = DeepseekV3Config(
        vocab_size=8192,
        hidden_size=2048,
        intermediate_size=4096,
        num_hidden_layers=4,
        num_attention_heads=16,
        num_key_value_heads=16,
        first_k_dense_replace=4,
        q_lora_rank=None,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        max_position_embeddings=8192,
        num_mtp_layers=0,
    )
    DeepseekV3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


class _Side:
    """A cache already filled with random latents, and steps that follow it."""

    def __init__(self, decoder: Decoder, form: type[Decode], batch: int, context: int) -> None:
        self.decoder, self.form, self.context = decoder, form, context
        pages = (context + STEPS) // PAGE + 1
        self.cache = PagedCache(decoder.config, batch * pages, PAGE, torch.bfloat16, torch.device("cpu"))
        generator = torch.Generator().manual_seed(0)
        for store in self.cache.keys:
            store.copy_(torch.randn(store.shape, generator=generator))
        self.tables = [list(range(row * pages, (row + 1) * pages)) for row in range(batch)]

    @torch.inference_mode()
    def steps(self) -> Tensor:
        """Logits of the last of STEPS given tokens, [B, V]."""
        logits = torch.empty(0)
        for step in range(STEPS):
            attend = self.form(self.cache, self.tables, [[self.context + step]] * len(self.tables))
            ids = torch.arange(len(self.tables)) + 7 * step
            logits = self.decoder.logits(self.decoder.hidden(ids, attend.positions, attend))
        return logits


def _measure(folder: Path, batch: int, args: argparse.Namespace) -> None:
    hf: dict[str, Any] = json.loads((folder / "config.json").read_text())
    decoder = load_decoder(folder)
    context = 256 if args.quick else CONTEXT
    absorbed, expanded = (_Side(decoder, form, batch, context) for form in (Decode, _Expanded))
    if args.profile:
        profile(f"decode_mla/batch{batch}", absorbed.steps)
        return
    apart = float((absorbed.steps() - expanded.steps()).abs().max())
    say(f"batch {batch}: logits of the two forms differ by at most {apart:.3f}")
    mla = decoder.config.mla
    assert mla is not None
    cached = batch * context * absorbed.cache.bytes_per_token
    flops = forward_flops(hf, batch, batch * context, batch)
    compare(
        f"decode_mla/batch{batch}",
        "tokens/s",
        absorbed.steps,
        expanded.steps,
        "the expanded form",
        runs=args.runs,
        amount=batch * STEPS,
        work=[Phase(flops, cached + parameters(hf).active * 2, STEPS)],
        details={
            "context": context,
            "logits_apart": round(apart, 4),
            "cache_bytes_per_token": absorbed.cache.bytes_per_token,
            "cache_mb": round(cached / 1e6, 1),
            "gqa_bytes_per_token": 2 * 2 * decoder.config.num_layers * decoder.config.num_heads * mla.v_dim,
            "transformers_tokens_per_s": round(batch * STEPS / _transformers(folder, batch, context), 2),
        },
    )


@torch.inference_mode()
def _transformers(folder: Path, batch: int, context: int) -> float:
    """Seconds transformers takes for STEPS tokens after `context` of them, the prompt's own pass taken off."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    prompt = torch.randint(0, 8192, (batch, context), generator=torch.Generator().manual_seed(0))
    cache = model(prompt, use_cache=True, logits_to_keep=1).past_key_values
    ids = torch.zeros(batch, 1, dtype=torch.long)

    def step() -> None:
        model(ids, past_key_values=cache, use_cache=True)

    step()
    return min(timed(step) for _ in range(3)) * STEPS


if __name__ == "__main__":
    main()
