"""Every family that can be counted, against the network that transformers builds from the same config."""

import pytest

from farthing.base.errors import UserError
from farthing.cost.families import FAMILIES
from farthing.cost.flops import parameters
from farthing.cost.shapes import shapes

BASE = {
    "vocab_size": 160, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "intermediate_size": 96, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
GROUPED = BASE | {"num_key_value_heads": 2}
BIASED = GROUPED | {"attention_bias": True}
UNSCALED = {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 1.0}
GPT = {"vocab_size": 160, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 32}
FALCON = {"vocab_size": 160, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
OPT = FALCON | {"ffn_dim": 96, "max_position_embeddings": 32}
EXPERTS = {
    "n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 2, "moe_intermediate_size": 20,
    "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1, "num_nextn_predict_layers": 1,
}  # fmt: skip
LATENT = BASE | EXPERTS | {
    "kv_lora_rank": 24, "q_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 12,
    "num_key_value_heads": 4,
}  # fmt: skip
QWEN_MOE = GROUPED | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}

CASES = [
    ("llama", "Llama", GROUPED), ("llama", "Llama", BIASED | {"mlp_bias": True, "tie_word_embeddings": True}),
    ("llama", "Llama", BASE | {"head_dim": 24, "num_key_value_heads": 1}),
    ("mistral", "Mistral", GROUPED | {"head_dim": 8}),
    ("qwen2", "Qwen2", GROUPED | {"tie_word_embeddings": True}),
    ("qwen3", "Qwen3", GROUPED), ("qwen3", "Qwen3", BIASED),
    ("deepseek_v2", "DeepseekV2", LATENT),
    ("deepseek_v2", "DeepseekV2", LATENT | {"q_lora_rank": None, "attention_bias": True}),
    ("deepseek_v3", "DeepseekV3", LATENT), ("deepseek_v3", "DeepseekV3", LATENT | {"attention_bias": True}),
    ("glm4_moe", "Glm4Moe", GROUPED | EXPERTS | {"rope_parameters": UNSCALED}),
    ("glm4_moe", "Glm4Moe", BIASED | EXPERTS | {"use_qk_norm": True, "head_dim": 24}),
    ("apertus", "Apertus", GROUPED | {"rope_parameters": UNSCALED}),
    ("bloom", "Bloom", {"vocab_size": 160, "hidden_size": 64, "n_layer": 3, "n_head": 4}),
    ("dbrx", "Dbrx", {
        "vocab_size": 160, "d_model": 64, "n_layers": 3, "n_heads": 4, "max_seq_len": 32,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    }),
    ("falcon", "Falcon", FALCON),
    ("falcon", "Falcon", FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    ("falcon", "Falcon", FALCON | {"parallel_attn": False, "bias": True, "multi_query": False}),
    ("gemma", "Gemma", BASE | {"num_key_value_heads": 1, "head_dim": 32}),
    ("gemma2", "Gemma2", GROUPED), ("gemma3_text", "Gemma3", GROUPED),
    ("gpt_oss", "GptOss", GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    ("gpt2", "GPT2", GPT), ("gpt_bigcode", "GPTBigCode", GPT),
    ("gpt_bigcode", "GPTBigCode", GPT | {"multi_query": False}),
    ("gpt_neox", "GPTNeoX", BASE), ("gptj", "GPTJ", GPT | {"rotary_dim": 8}), ("granite", "Granite", GROUPED),
    ("jetmoe", "JetMoe", {
        "vocab_size": 160, "hidden_size": 64, "num_hidden_layers": 3, "num_key_value_heads": 4,
        "kv_channels": 16, "intermediate_size": 48, "num_local_experts": 4, "num_experts_per_tok": 2,
        "max_position_embeddings": 32,
    }),
    ("mixtral", "Mixtral", GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    ("mpt", "Mpt", {"vocab_size": 160, "d_model": 64, "n_layers": 3, "n_heads": 4, "max_seq_len": 32}),
    ("nemotron", "Nemotron", GROUPED), ("olmo", "Olmo", GROUPED), ("olmo2", "Olmo2", GROUPED),
    ("olmo3", "Olmo3", GROUPED), ("olmoe", "Olmoe", GROUPED | {"num_experts": 4, "num_experts_per_tok": 2}),
    ("opt", "OPT", OPT | {"word_embed_proj_dim": 64}),
    ("opt", "OPT", OPT | {"word_embed_proj_dim": 32, "do_layer_norm_before": False}),
    ("phi", "Phi", BASE), ("phi", "Phi", BASE | {"qk_layernorm": True}), ("phi3", "Phi3", GROUPED),
    ("qwen2_moe", "Qwen2Moe", QWEN_MOE | {"shared_expert_intermediate_size": 40, "decoder_sparse_step": 2}),
    ("qwen3_moe", "Qwen3Moe", QWEN_MOE), ("qwen3_moe", "Qwen3Moe", QWEN_MOE | {"mlp_only_layers": [1]}),
    ("smollm3", "SmolLM3", GROUPED), ("stablelm", "StableLm", GROUPED | {"use_qkv_bias": True}),
    ("stablelm", "StableLm", GROUPED | {"qk_layernorm": True, "use_parallel_residual": True}),
    ("starcoder2", "Starcoder2", GROUPED),
]  # fmt: skip


@pytest.mark.parametrize(("family", "name", "config"), CASES, ids=[case[0] for case in CASES])
def test_parameters_are_exact(family, name, config):
    transformers = pytest.importorskip("transformers")
    import torch

    kind = "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config"
    built = getattr(transformers, kind)(**config)
    with torch.device("meta"):
        model = getattr(transformers, "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM")(built)
    counted = parameters(built.to_dict())
    assert counted.total == sum(p.numel() for p in model.parameters())
    assert counted.embedding == model.get_input_embeddings().weight.numel()
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert counted.head == (0 if tied else model.get_output_embeddings().weight.numel())
    # what was asked for counts as what the library made of it
    assert parameters({"model_type": family, **config}) == counted


def test_every_family_is_compared():
    assert {case[0] for case in CASES} == set(FAMILIES) - {
        "kimi_k2"
    }  # the last is DeepSeek-V3 by another name
    assert FAMILIES["kimi_k2"] is FAMILIES["deepseek_v3"]


def test_what_farthing_runs_is_known():
    from farthing.weights import decoder_config
    from farthing.weights.layouts import LAYOUTS

    runs = {}
    for family, _, config in CASES:
        try:
            decoder_config({"model_type": family, "hidden_act": "silu", **config})
            runs[family] = True
        except UserError:
            runs.setdefault(family, False)
    works = {family for family, works in runs.items() if works}
    assert works == {family for layout in LAYOUTS for family in layout.MODEL_TYPES}


def test_active_parameters_are_those_a_token_meets():
    config = {"model_type": "deepseek_v3", **LATENT}
    counted = parameters(config)
    idle = (8 - 2) * 3 * 64 * 20  # experts not chosen
    assert counted.total - counted.active == 3 * idle  # the first layer is dense
    assert shapes(config).layers[1].inner == 2 * 20 + 2 * 20


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model_type": "lama"}, r"'lama': did you mean llama\?.*qwen2"),
        ({"model_type": "zamba-of-mine"}, r"'zamba-of-mine'.*types known are llama"),
        ({"model_type": None}, "None"),
        ({"num_hidden_layers": 10**9}, "1000000000 layers"),
        ({"num_hidden_layers": "12"}, "num_hidden_layers: '12'"),
        ({"hidden_size": True}, "hidden_size: True"),
        ({"vocab_size": 0}, "vocab_size: 0"),
        ({"model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 3}, "chooses 3 of 2"),
        ({"model_type": "deepseek_v3", "n_routed_experts": 4, "kv_lora_rank": 8}, "qk_nope_head_dim: None"),
    ],
)
def test_damaged_configs_are_one_sentence(changes, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        shapes({"model_type": "llama", **GROUPED} | changes)
    assert "\n" not in str(caught.value)
