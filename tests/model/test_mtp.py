"""Prediction modules against transformers' `MtpModel`, chained and loaded from the folder we write."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers import DeepseekV3Config
from transformers.modeling_layers import MtpModel

from farthing.model import Decoder, Routing, Segments
from farthing.weights import decoder_config, load_decoder, save_decoder
from farthing.weights.folder import read_tensors

LAYERS, LENGTH = 2, 40
SMALL: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16,
    "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 4, "n_routed_experts": 8,
    "num_experts_per_tok": 3, "kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 12,
    "v_head_dim": 12, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1, "max_position_embeddings": 256,
}  # fmt: skip
CASES = {"one": {"depth": 1}, "two": {"depth": 2}, "two-tied": {"depth": 2, "tie_word_embeddings": True}}


def network(depth: int, **changed: Any) -> tuple[Decoder, dict[str, Any]]:
    hf = DeepseekV3Config(**SMALL, **changed).to_dict() | {"num_nextn_predict_layers": depth}
    torch.manual_seed(11)
    decoder = Decoder(decoder_config(hf))
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
    return decoder.eval(), hf


def in_transformers(decoder: Decoder, hf: dict[str, Any], folder: Any) -> tuple[Any, Any, Any]:
    """Return transformers' model, its prediction modules and its report on the keys, from the folder we write."""
    save_decoder(decoder, hf, folder, tokenizer_from=None)
    kinds = {"dtype": torch.float32, "experts_implementation": "eager"}
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, **kinds
    )
    # It looks for modules only under model.layers.61, whatever the model's depth; ours come after the last layer.
    numbers = "|".join(str(LAYERS + k) for k in range(decoder.config.mtp_depth))
    model._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.({numbers})\."]
    return model.eval(), MtpModel.from_pretrained(model).eval(), report


@pytest.fixture(params=CASES, ids=list(CASES))
def pair(request, tmp_path):
    ours, hf = network(**CASES[request.param])
    theirs, modules, report = in_transformers(ours, hf, tmp_path / "model")
    return SimpleNamespace(ours=ours, hf=hf, theirs=theirs, modules=modules, report=report)


def our_logits(decoder: Decoder, ids: torch.Tensor) -> list[torch.Tensor]:
    """Return the logits of the decoder and of each module, with one row per token it can look at."""
    attend, positions = Segments([(len(ids), ())]), torch.arange(len(ids))
    hidden = decoder.hidden(ids, positions, attend)
    out = [decoder.logits(hidden)]
    for depth in range(decoder.config.mtp_depth):
        ahead = F.pad(ids[depth + 1 :], (0, depth + 1))
        hidden = decoder.mtp_hidden(depth, ahead, hidden, positions, attend)
        out.append(decoder.logits(hidden)[: -depth - 1])
    return out


def their_logits(model: Any, modules: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    out = [model(ids[None]).logits[0]]
    hidden = model.model(ids[None]).last_hidden_state
    for depth, module in enumerate(modules.layers):
        hidden = hidden[:, : len(ids) - depth - 1]
        embedded = model.model.embed_tokens(ids[None, depth + 1 :])
        positions = torch.arange(depth + 1, len(ids))[None]  # of the tokens read; rotation is relative
        rope = model.model.rotary_emb(embedded, positions)
        hidden = module(embedded, hidden, rope, None, positions, None)
        out.append(model.lm_head(hidden)[0])
    return out


def tokens(seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 97, (LENGTH,), generator=torch.Generator().manual_seed(seed))


def test_chained_modules_equal_transformers(pair):
    with torch.no_grad():
        got, expected = our_logits(pair.ours, tokens()), their_logits(pair.theirs, pair.modules, tokens())
    assert len(got) == len(expected) == 1 + pair.ours.config.mtp_depth
    for depth, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
        assert ours.shape == (LENGTH - depth, 97)
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_gradients_equal_transformers(pair, tmp_path):
    """Gradients of the modules and, through them, of the decoder, the embedding and the head."""
    ids = tokens(2)
    for model, logits in (
        (pair.ours, our_logits(pair.ours, ids)),
        (pair.theirs, their_logits(pair.theirs, pair.modules, ids)),
    ):
        model.zero_grad()
        sum(F.cross_entropy(out[:-1], ids[k + 1 :]) for k, out in enumerate(logits)).backward()
    # save the gradients as if they were weights, to get them under transformers' names
    carrier = copy.deepcopy(pair.ours)
    with torch.no_grad():
        for parameter, ours in zip(carrier.parameters(), pair.ours.parameters(), strict=True):
            if parameter.requires_grad:
                parameter.copy_(ours.grad)
    carried, modules, _ = in_transformers(carrier, pair.hf, tmp_path / "gradients")
    for holder, theirs in ((carried, pair.theirs), (modules, pair.modules)):
        gradients = dict(holder.named_parameters())
        for name, parameter in theirs.named_parameters():
            torch.testing.assert_close(
                gradients[name], parameter.grad, atol=1e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
            )
    assert pair.ours.mtp[-1].join.weight.grad.abs().max() > 1e-3


def test_transformers_reports_only_the_modules_as_unexpected(pair):
    """It recognises modules only after layer 60; at any other depth it reports them as unexpected and ignores them."""
    numbers = tuple(f"model.layers.{LAYERS + k}." for k in range(pair.ours.config.mtp_depth))
    assert not pair.report["missing_keys"]
    assert pair.report["unexpected_keys"]
    assert all(key.startswith(numbers) for key in pair.report["unexpected_keys"])


def test_a_folder_repeats_the_embedding_and_the_head_in_each_module(pair, tmp_path):
    folder = save_decoder(pair.ours, pair.hf, tmp_path / "again", None)
    written = dict(read_tensors(folder))
    for number in range(LAYERS, LAYERS + pair.ours.config.mtp_depth):
        own = f"model.layers.{number}"
        assert torch.equal(written[f"{own}.embed_tokens.weight"], pair.ours.embed.weight)
        assert torch.equal(written[f"{own}.shared_head.head.weight"], pair.ours.head.weight)
        assert written[f"{own}.eh_proj.weight"].shape == (32, 64)
    back = load_decoder(folder, torch.float32)
    assert back.config.mtp_depth == pair.ours.config.mtp_depth
    for ours, again in zip(our_logits(pair.ours, tokens()), our_logits(back, tokens()), strict=True):
        assert torch.equal(ours, again)


def test_a_module_reads_the_embedding_first():
    """The order of DeepSeek's weights, the reverse of the paper's equation 21."""
    decoder, _ = network(1)
    module = decoder.mtp[0]
    with torch.no_grad():
        module.join.weight[:, 32:] = 0  # ignore the decoder's output
    attend, positions = Segments([(LENGTH, ())]), torch.arange(LENGTH)
    outs = [decoder.mtp_hidden(0, tokens(3), torch.randn(LENGTH, 32), positions, attend) for _ in range(2)]
    assert torch.equal(*outs)


def test_each_module_looks_exactly_one_token_further():
    decoder, _ = network(2)
    ids, at = tokens(4), 15
    before = our_logits(decoder, ids)
    ids[at] = (ids[at] + 1) % 97
    for depth, (was, now) in enumerate(zip(before, our_logits(decoder, ids), strict=True)):
        # experts that get a row more or less may round differently
        changed = ((was - now).abs() > 1e-5).any(-1)
        assert not changed[: at - depth].any()
        assert changed[at - depth]


def test_modules_follow_the_last_layer_in_the_routing():
    decoder, _ = network(2)
    attend, positions, routing = Segments([(LENGTH, ())]), torch.arange(LENGTH), Routing()
    hidden = decoder.hidden(tokens(), positions, attend, routing)
    for depth in range(2):
        hidden = decoder.mtp_hidden(depth, tokens(), hidden, positions, attend, routing)
    assert list(routing.loads) == [1, LAYERS, LAYERS + 1]
