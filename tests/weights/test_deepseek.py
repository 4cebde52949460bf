"""DeepSeek's folders: the same logits and gradients as transformers, and folders that go both ways unchanged."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DeepseekV2Config, DeepseekV3Config

from farthing.base.errors import UserError
from farthing.model import Decoder
from farthing.weights import decoder_config, deepseek, load_decoder, save_decoder
from farthing.weights.folder import read_config, read_tensors

SMALL: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4, "n_shared_experts": 1,
    "n_routed_experts": 8, "num_experts_per_tok": 3, "kv_lora_rank": 16, "q_lora_rank": 24,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 12, "v_head_dim": 12, "n_group": 4, "topk_group": 2,
    "first_k_dense_replace": 1, "max_position_embeddings": 256,
}  # fmt: skip
ONE_GROUP = {"n_group": 1, "topk_group": 1}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 32}


def v3(**changed: Any) -> DeepseekV3Config:
    return DeepseekV3Config(**{**SMALL, **changed})


def v2(**changed: Any) -> DeepseekV2Config:
    return DeepseekV2Config(**{**SMALL, "norm_topk_prob": False, **changed})


def yarn(**settings: float) -> DeepseekV3Config:
    """Positions go to 90 in the tests, and the original context ends at 32."""
    return v3(rope_parameters={**YARN, **settings})


CASES = {
    "v3": v3(),
    "no-q-lora": v3(q_lora_rank=None),
    "one-group": v3(**ONE_GROUP),
    "all-groups": v3(n_group=2, topk_group=2, num_experts_per_tok=5),
    "gates-as-they-are": v3(norm_topk_prob=False, routed_scaling_factor=1.0),
    "moonlight": v3(
        **ONE_GROUP, q_lora_rank=None, rms_norm_eps=1e-5, n_shared_experts=2, routed_scaling_factor=2.446,
        rope_parameters={"rope_type": "default", "rope_theta": 5e4},
    ),
    "all-layers-mixed": v3(first_k_dense_replace=0),
    "all-layers-dense": v3(first_k_dense_replace=3),
    "no-shared-expert": v3(n_shared_experts=0),
    "one-expert-a-token": v3(num_experts_per_tok=1, topk_group=1),
    "odd-expert-width": v3(moe_intermediate_size=7),
    "tied-head": v3(tie_word_embeddings=True),
    "values-narrow": v3(v_head_dim=5),
    "values-as-wide-as-keys": v3(v_head_dim=20),
    "values-wider-than-keys": v3(v_head_dim=28),
    "odd-width-without-position": v3(qk_nope_head_dim=7, qk_rope_head_dim=2),
    "linear-rope": v3(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}),
    "yarn-of-v3": yarn(mscale=1.0, mscale_all_dim=1.0, beta_fast=32.0, beta_slow=1.0),
    "yarn-of-v2-lite": yarn(mscale=0.707, mscale_all_dim=0.707),
    "yarn-two-scales": yarn(mscale=1.0, mscale_all_dim=0.5, beta_fast=4.0, beta_slow=0.5),
    "yarn-scale-of-tables-alone": yarn(),
    "yarn-scale-of-scores-alone": yarn(mscale_all_dim=1.0, attention_factor=1.0),
    "v2": v2(topk_method="group_limited_greedy", n_shared_experts=2, routed_scaling_factor=16.0),
    "v2-lite": v2(
        **ONE_GROUP, topk_method="greedy", q_lora_rank=None, n_shared_experts=2,
        rope_parameters={**YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
    ),
    "v2-groups-not-looked-at": v2(topk_method="greedy"),
}  # fmt: skip


@pytest.fixture(scope="module", params=CASES, ids=list(CASES))
def pair(request, pair_of):
    return pair_of(CASES[request.param])


def test_logits_equal_transformers(pair, same):
    same.logits(pair)


def test_gradients_equal_transformers(pair, same):
    same.gradients(pair, "padded")


@pytest.mark.parametrize("case", ["v3", "v2", "all-groups"])
@pytest.mark.parametrize("experts", ["each", "ragged"])
def test_gradients_however_the_experts_are_computed(case, experts, pair_of, same):
    same.gradients(pair_of(CASES[case]), experts)


def test_saved_folder_loads_in_transformers_with_no_key_left_over(pair, same):
    same.saved(pair)


def test_the_latent_norms_keep_their_own_epsilon(pair_of, same):
    """With latents as small as the epsilon, that of the config would give other logits."""
    pair = pair_of(v3(rms_norm_eps=1e-3, **ONE_GROUP), quieter=1e-3)
    same.logits(pair)


# ---- what is written ----


def test_the_config_has_the_keys_that_other_engines_read(tmp_path):
    """transformers writes neither how experts are scored nor rotary settings as they were before version 5."""
    theirs = yarn(mscale=1.0, mscale_all_dim=1.0).to_dict()
    assert "scoring_func" not in theirs
    decoder = random_decoder(theirs)
    written = read_config(save_decoder(decoder, theirs, tmp_path / "model", None))
    assert written["scoring_func"] == "sigmoid"
    assert written["topk_method"] == "noaux_tc"
    assert written["moe_layer_freq"] == 1
    assert written["num_key_value_heads"] == 4
    assert written["num_nextn_predict_layers"] == 1
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == 1e4
    for spelling in ("rope_parameters", "rope_scaling"):
        assert written[spelling]["rope_type"] == "yarn"
        assert written[spelling]["factor"] == 8.0
    assert written["rope_scaling"]["type"] == "yarn"


@pytest.mark.parametrize(("method", "groups"), [("greedy", 1), ("group_limited_greedy", 4)])
def test_the_way_v2_chooses_is_written(method, groups):
    hf = v2(topk_method=method).to_dict()
    config = decoder_config(hf)
    assert config.moe is not None
    assert config.moe.groups == groups
    written = deepseek.complete(hf, config)
    assert (written["topk_method"], written["scoring_func"]) == (method, "softmax")
    assert decoder_config(written) == config


def test_rotary_settings_of_both_spellings_mean_the_same():
    new = yarn(mscale=1.0, mscale_all_dim=0.5).to_dict()
    old = {key: value for key, value in new.items() if key != "rope_parameters"}
    old |= {"rope_theta": 1e4, "rope_scaling": {**YARN, "type": "yarn", "mscale": 1.0, "mscale_all_dim": 0.5}}
    del old["rope_scaling"]["rope_type"], old["rope_scaling"]["rope_theta"]
    assert decoder_config(old) == decoder_config(new)


def test_of_two_rotary_settings_the_one_that_counts_is_written(tmp_path):
    """Of two that disagree transformers takes `rope_scaling`, and so must what reads the folder that is written."""
    both = yarn(mscale=1.0, mscale_all_dim=1.0).to_dict() | {
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "rope_theta": 500.0,
    }
    decoder = random_decoder(both)
    assert (decoder.config.rope.kind, decoder.config.rope.factor) == ("linear", 2.0)
    folder = save_decoder(decoder, both, tmp_path / "model", None)
    assert decoder_config(read_config(folder)) == decoder.config
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, decoder(ids), atol=1e-3, rtol=0)


def test_corrections_stay_float32_in_a_bfloat16_folder(tmp_path):
    hf = v3(num_nextn_predict_layers=0).to_dict()
    decoder = random_decoder(hf)
    fine = 5.0 + torch.arange(8) / 1024  # all of these are 5 in bfloat16
    router = decoder.layers[1].feedforward.router
    with torch.no_grad():
        router.bias.copy_(fine)
    folder = save_decoder(decoder.bfloat16(), hf, tmp_path / "model", None)
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert torch.equal(dict(read_tensors(folder))[name], fine)
    loaded = load_decoder(folder).layers[1].feedforward.router
    assert loaded.weight.dtype == torch.bfloat16
    assert torch.equal(loaded.bias, fine)


def test_a_config_that_promises_a_module_the_folder_lacks(tmp_path):
    """transformers writes one prediction module into every config.json and none into the weights."""
    hf = v3().to_dict()
    assert decoder_config(hf).mtp_depth == 1
    decoder = random_decoder(hf | {"num_nextn_predict_layers": 0})
    folder = save_decoder(decoder, hf, tmp_path / "model", None)
    promising = read_config(folder) | {"num_nextn_predict_layers": 1}
    (folder / "config.json").write_text(json.dumps(promising))
    loaded = load_decoder(folder, torch.float32)
    assert loaded.config == replace(decoder_config(promising), mtp_depth=0)
    assert len(loaded.mtp) == 0
    ids = torch.arange(20)[None]
    assert torch.equal(loaded(ids), decoder(ids))
    again = read_config(save_decoder(loaded, promising, tmp_path / "again", None))
    assert again["num_nextn_predict_layers"] == 0


# ---- there and back ----


def random_decoder(hf: dict[str, Any], dtype: torch.dtype = torch.float32) -> Decoder:
    torch.manual_seed(3)
    decoder = Decoder(decoder_config(hf))
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.normal_()
    return decoder.to(dtype)


@st.composite
def valid_configs(draw: Any) -> dict[str, Any]:
    whole = st.integers
    version = draw(st.sampled_from(["deepseek_v3", "deepseek_v2"]))
    groups, each, layers = draw(whole(1, 3)), draw(whole(2, 3)), draw(whole(1, 3))
    top_groups = draw(whole(1, groups))
    method = (
        "noaux_tc" if version == "deepseek_v3" else draw(st.sampled_from(["greedy", "group_limited_greedy"]))
    )
    out = {
        "model_type": version, "vocab_size": 11, "hidden_size": draw(whole(1, 9)),
        "intermediate_size": draw(whole(1, 7)), "moe_intermediate_size": draw(whole(1, 7)),
        "num_hidden_layers": layers, "num_attention_heads": draw(whole(1, 3)), "kv_lora_rank": draw(whole(1, 9)),
        "q_lora_rank": draw(st.none() | whole(1, 9)), "qk_nope_head_dim": draw(whole(1, 5)),
        "qk_rope_head_dim": 2 * draw(whole(1, 3)), "v_head_dim": draw(whole(1, 9)),
        "n_routed_experts": groups * each, "n_group": groups, "topk_group": top_groups,
        "num_experts_per_tok": draw(whole(1, top_groups * each)), "n_shared_experts": draw(whole(0, 2)),
        "first_k_dense_replace": draw(whole(0, layers)), "topk_method": method,
        "norm_topk_prob": version == "deepseek_v3" and draw(st.booleans()),
        "routed_scaling_factor": draw(st.sampled_from([1.0, 2.5])), "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5])),
        "tie_word_embeddings": draw(st.booleans()), "max_position_embeddings": 64,
        "num_nextn_predict_layers": draw(whole(0, 2)) if version == "deepseek_v3" else 0,
    }  # fmt: skip
    if draw(st.booleans()):
        out["rope_parameters"] = {**YARN, "mscale": draw(st.sampled_from([0.5, 1.0])), "mscale_all_dim": 1.0}
    return out


@settings(max_examples=30)
@given(hf=valid_configs(), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_any_network_comes_back_as_it_was(hf, dtype, tmp_path_factory):
    decoder = random_decoder(hf, dtype)
    folder = save_decoder(decoder, hf, tmp_path_factory.mktemp("any") / "model", None)
    back = load_decoder(folder, dtype)
    assert back.config == decoder.config
    after = dict(back.named_parameters())
    assert after.keys() == dict(decoder.named_parameters()).keys()
    for name, parameter in decoder.named_parameters():
        assert after[name].dtype == parameter.dtype
        assert torch.equal(after[name], parameter), name


@given(
    nope=st.integers(1, 6), half=st.integers(1, 5), heads=st.integers(1, 4), latent=st.integers(1, 9),
    part=st.sampled_from(["q_b_proj", "q_proj", "kv_a_proj_with_mqa"]),
)  # fmt: skip
def test_rows_change_places_and_back(nope, half, heads, latent, part):
    """Rotated pairs (2i, 2i + 1) on disk are (i, i + half) here; every other row stays where it is."""
    sizes = {"qk_nope_head_dim": nope, "qk_rope_head_dim": 2 * half, "kv_lora_rank": latent}
    heads_here = {"num_attention_heads": heads, "num_key_value_heads": heads}
    config = decoder_config({**SMALL, "model_type": "deepseek_v3", **sizes, **heads_here})
    order = deepseek.row_order(config, f"model.layers.0.self_attn.{part}.weight")
    assert order is not None
    blocks, before = (1, latent) if part.startswith("kv") else (heads, nope)
    assert torch.equal(order[order.argsort()], torch.arange(blocks * (before + 2 * half)))
    for block, rows in enumerate(order.view(blocks, -1)):
        start = block * (before + 2 * half)
        assert rows[:before].tolist() == list(range(start, start + before))
        for i in range(half):
            assert rows[before + i] == start + before + 2 * i
            assert rows[before + half + i] == start + before + 2 * i + 1


def test_other_rows_stay_where_they_are():
    config = decoder_config({**SMALL, "model_type": "deepseek_v3"})
    for name in ("q_a_proj", "kv_b_proj", "o_proj"):
        assert deepseek.row_order(config, f"model.layers.0.self_attn.{name}.weight") is None


# ---- configs that are refused ----

WRONG = {
    "one expert a group": ({"n_group": 8, "topk_group": 4}, "n_group (8) leaves 1 of 8 routed experts per group"),
    "groups do not divide": ({"n_group": 3, "topk_group": 2}, "n_group (3) must divide n_routed_experts (8)"),
    "too many groups": ({"topk_group": 5}, "topk_group (5) must not exceed n_group (4)"),
    "too many experts": ({"num_experts_per_tok": 5}, "num_experts_per_tok (5) exceeds the 4 experts in 2 groups"),
    "no expert": ({"num_experts_per_tok": 0}, "num_experts_per_tok is 0"),
    "odd rope": ({"qk_rope_head_dim": 7}, "qk_rope_head_dim is 7"),
    "no latent": ({"kv_lora_rank": 0}, "kv_lora_rank is 0"),
    "a latent that is no number": ({"kv_lora_rank": "16"}, "kv_lora_rank is '16'"),
    "biases": ({"attention_bias": True}, "attention_bias"),
    "halves on disk": ({"rope_interleave": False}, "rope_interleave"),
    "every second layer": ({"moe_layer_freq": 2}, "moe_layer_freq 2"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    "unknown choice": ({"topk_method": "best"}, "topk_method 'best'"),
    "unknown scores": ({"scoring_func": "tanh"}, "scoring_func 'tanh'"),
    "key heads": ({"num_key_value_heads": 2}, "num_key_value_heads (2) must equal num_attention_heads (4)"),
    "unknown scaling": ({"rope_scaling": {"type": "ntk"}}, "rope_type 'ntk'"),
    "v2 normalised": ({"model_type": "deepseek_v2", "norm_topk_prob": True}, "norm_topk_prob"),
}  # fmt: skip


@pytest.mark.parametrize(("changed", "complaint"), WRONG.values(), ids=list(WRONG))
def test_a_config_that_is_refused(changed, complaint):
    with pytest.raises(UserError) as caught:
        decoder_config({**SMALL, "model_type": "deepseek_v3", **changed})
    message = str(caught.value)
    assert message.startswith("config.json")
    assert complaint in message
    assert "\n" not in message


NEEDED = [
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "kv_lora_rank",
    "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "moe_intermediate_size", "num_experts_per_tok",
]  # fmt: skip


@pytest.mark.parametrize("key", NEEDED)
def test_a_key_that_is_missing_is_named(key):
    hf = {**SMALL, "model_type": "deepseek_v3"}
    del hf[key]
    with pytest.raises(UserError, match=f"has no '{key}'"):
        decoder_config(hf)


def test_half_a_module_is_refused(tmp_path: Path):
    from safetensors.torch import save_file

    hf = v3().to_dict()
    folder = save_decoder(random_decoder(hf), hf, tmp_path / "model", None)
    kept = {name: tensor for name, tensor in read_tensors(folder) if not name.endswith("eh_proj.weight")}
    save_file(kept, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"layers\.3\.eh_proj\.weight' is missing \(1 in all\)"):
        load_decoder(folder)
