"""Latent attention: both forms agree, and cache entries have the documented size."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from farthing.model import Decoder, Mla, ModelConfig, Moe, Rope, Segments
from farthing.model.latent import LatentAttention
from farthing.model.layers import Lora
from farthing.weights import decoder_config

ROOT = Path(__file__).parents[2]
YARN = Rope(kind="yarn", factor=8.0, original_max_positions=16, table_scale=1.1, score_scale=1.7)


def config(q_lora_rank: int | None = 10, v_dim: int = 5, **changed: Any) -> ModelConfig:
    mla = Mla(q_lora_rank, kv_lora_rank=12, nope_dim=7, rope_dim=4, v_dim=v_dim)
    return ModelConfig(97, 24, 40, 2, 3, 3, mla.qk_dim, mla=mla, **changed)


def network(settings: ModelConfig) -> Decoder:
    decoder = Decoder(settings)
    decoder.init_weights(seed=0, std=0.3)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return decoder


class Absorbed(Segments):
    """The absorbed form, spelled out for each sequence."""

    def latent(self, attention: LatentAttention, q_NHD: Tensor, c_NL: Tensor, r_NR: Tensor) -> Tensor:
        outs = []
        lengths = [prefix for prefix, _ in self.segments]
        entries = torch.cat([c_NL, r_NR], -1)
        for q, kv in zip(attention.absorb(q_NHD).split(lengths), entries.split(lengths), strict=True):
            scores = torch.einsum("nhw,mw->hnm", q, kv) * q_NHD.shape[-1] ** -0.5
            hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
            weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
            outs.append(torch.einsum("hnm,ml->nhl", weights, kv[:, : c_NL.shape[-1]]))
        return attention.unabsorb(torch.cat(outs))


CASES = {
    "plain": config(),
    "no-q-lora": config(q_lora_rank=None),
    "values-wider": config(v_dim=14),
    "yarn": config(rope=YARN),
}


@pytest.mark.parametrize("lora", [False, True], ids=["", "lora"])
@pytest.mark.parametrize("settings", CASES.values(), ids=list(CASES))
def test_absorbed_equals_expanded(settings, lora):
    decoder = network(settings)
    if lora:  # a low-rank update of the absorbed matrix must be absorbed too
        for layer in decoder.layers:
            up = layer.attention.kv_b
            up.lora = Lora(up, rank=3, alpha=6.0, generator=torch.Generator().manual_seed(1))
            torch.nn.init.normal_(up.lora.up)
    ids = torch.randint(0, 97, (50,), generator=torch.Generator().manual_seed(2))
    results = []
    for kind in (Segments, Absorbed):
        attend = kind([(20, ()), (30, ())])
        out = decoder.hidden(ids, attend.positions(), attend)
        grads = torch.autograd.grad(
            out.square().mean(), [layer.attention.o.weight for layer in decoder.layers]
        )
        results.append((out, *grads))
    for expanded, absorbed in zip(*results, strict=True):
        torch.testing.assert_close(absorbed, expanded, atol=1e-5, rtol=1e-5)


def test_a_low_rank_update_changes_both_forms():
    attention = network(config()).layers[0].attention
    q, c, r = torch.randn(6, 3, 11), torch.randn(6, 12), torch.randn(6, 4)
    plain = Absorbed([(6, ())]).latent(attention, q, c, r)
    attention.kv_b.lora = Lora(attention.kv_b, 3, 6.0, torch.Generator().manual_seed(1))
    torch.nn.init.normal_(attention.kv_b.lora.up)
    assert not torch.allclose(Absorbed([(6, ())]).latent(attention, q, c, r), plain, atol=0.1)


def test_samples_that_share_a_prompt_equal_separate_sequences():
    """With latent attention and a mixture of experts, which routes each token independently."""
    decoder = network(config(moe=Moe(experts=4, top_k=2, expert_size=8)))
    generator = torch.Generator().manual_seed(1)
    prompt, *tails = (torch.randint(0, 97, (n,), generator=generator) for n in (7, 5, 1, 9))
    tree = Segments([(7, [5, 1, 9])])
    out = decoder.logits(decoder.hidden(torch.cat([prompt, *tails]), tree.positions(), tree))
    start = 7
    for tail in tails:
        alone = decoder(torch.cat([prompt, tail])[None])[0]
        torch.testing.assert_close(out[start : start + len(tail)], alone[7:], atol=2e-5, rtol=1e-5)
        start += len(tail)


def test_packed_sequences_do_not_see_each_other():
    decoder = network(config())
    ids = torch.randint(0, 97, (30,), generator=torch.Generator().manual_seed(3))
    packed = Segments([(11, ()), (19, ())])
    out = decoder.logits(decoder.hidden(ids, packed.positions(), packed))
    torch.testing.assert_close(out[:11], decoder(ids[None, :11])[0], atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(out[11:], decoder(ids[None, 11:])[0], atol=2e-5, rtol=1e-5)


def test_heads_share_one_rotated_key():
    attention = network(config()).layers[0].attention
    c, r = torch.randn(6, 12), torch.randn(6, 4)
    keys, values = attention.expand(c, r)
    assert keys.shape == (6, 3, 11)
    assert values.shape == (6, 3, 5)
    assert all(torch.equal(keys[:, head, 7:], r) for head in range(3))


# ---- the cache ----

V3 = {
    "model_type": "deepseek_v3", "vocab_size": 129_280, "hidden_size": 7168, "intermediate_size": 18_432,
    "moe_intermediate_size": 2048, "num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128,
    "n_shared_experts": 1, "n_routed_experts": 256, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4,
    "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128,
    "first_k_dense_replace": 3, "routed_scaling_factor": 2.5,
}  # fmt: skip


def test_a_token_of_v3_takes_70_272_bytes():
    settings = decoder_config(V3)
    assert settings.mla is not None
    assert settings.mla.cache_dim == 576
    assert settings.num_layers * settings.mla.cache_dim * 2 == 70_272


def test_attend_receives_the_latent_and_the_rotated_key():
    """An `Attend` receives `cache_dim` elements per token, whatever the number of heads."""
    sizes = []

    class Recording(Segments):
        def latent(self, attention: LatentAttention, q_NHD: Tensor, c_NL: Tensor, r_NR: Tensor) -> Tensor:
            sizes.append(c_NL[0].numel() + r_NR[0].numel())
            return super().latent(attention, q_NHD, c_NL, r_NR)

    decoder = network(config())
    decoder.hidden(torch.arange(5), torch.arange(5), Recording([(5, ())]))
    assert sizes == [16, 16] == [decoder.config.mla.cache_dim] * 2


def test_the_documented_cache_sizes_are_correct():
    page = (ROOT / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| .+? \| (\d+) \| (\d+) \+ (\d+) \| ([\d,]+) \|$", page, flags=re.M)
    heads = re.findall(r"^\| .+? \| (\d+) \| 2 x (\d+) x (\d+) \| ([\d,]+) \|$", page, flags=re.M)
    assert len(rows) >= 2
    assert len(heads) >= 4
    for layers, latent, rotated, total in rows:
        assert int(layers) * (int(latent) + int(rotated)) * 2 == int(total.replace(",", ""))
    for layers, kv_heads, width, total in heads:
        assert int(layers) * 2 * int(kv_heads) * int(width) * 2 == int(total.replace(",", ""))
    assert ("61", "512", "64", "70,272") in rows
