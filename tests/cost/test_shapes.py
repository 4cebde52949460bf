"""Every family that can be counted, against the network that transformers builds from the same config."""

import pytest

from farthing.base.errors import UserError
from farthing.cost.families import FAMILIES, OTHER_KINDS, TEXT_MODELS
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

MIXED = GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2}
INDEXED = {"index_topk": 16, "index_head_dim": 12, "index_n_heads": 3}
DELTA = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 12, "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 3,
}  # fmt: skip
# transformers' name of its classes, where it is not that of the cases
CONFIG_NAMES = {"Gemma3": "Gemma3TextConfig", "Llama4": "Llama4TextConfig"}
MODEL_NAMES = {"GPT2": "GPT2LMHeadModel"}

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
    ("deepseek_v32", "DeepseekV32", LATENT | INDEXED),
    ("deepseek_v32", "DeepseekV32", LATENT | INDEXED | {"attention_bias": True}),
    ("dots1", "Dots1", GROUPED | EXPERTS), ("dots1", "Dots1", BIASED | EXPERTS | {"head_dim": 24}),
    ("granitemoe", "GraniteMoe", MIXED), ("granitemoe", "GraniteMoe", MIXED | {"attention_bias": True}),
    ("llama4", "Llama4", MIXED | {"intermediate_size_mlp": 80, "interleave_moe_layer_step": 2}),
    ("llama4", "Llama4", MIXED | {"intermediate_size_mlp": 80, "moe_layers": [1], "attention_bias": True}),
    ("minimax_m2", "MiniMaxM2", MIXED), ("minimax_m2", "MiniMaxM2", MIXED | {"head_dim": 24}),
    ("phimoe", "Phimoe", MIXED), ("phimoe", "Phimoe", MIXED | {"attention_bias": True, "lm_head_bias": True}),
    ("qwen3_next", "Qwen3Next", QWEN_MOE | DELTA | {"shared_expert_intermediate_size": 40}),
    ("qwen3_next", "Qwen3Next", QWEN_MOE | DELTA | {
        "attention_bias": True, "mlp_only_layers": [1], "shared_expert_intermediate_size": 40, "head_dim": 20,
        "full_attention_interval": 2,
    }),
]  # fmt: skip


@pytest.mark.parametrize(("family", "name", "config"), CASES, ids=[case[0] for case in CASES])
def test_parameters_are_exact(family, name, config):
    transformers = pytest.importorskip("transformers")
    import torch

    built = getattr(transformers, CONFIG_NAMES.get(name, f"{name}Config"))(**config)
    with torch.device("meta"):
        model = getattr(transformers, MODEL_NAMES.get(name, f"{name}ForCausalLM"))(built)
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


NESTED = [
    ("Gemma3", "language_model", GROUPED | {"head_dim": 24}),
    ("Glm4vMoe", "language_model", GROUPED | EXPERTS | {"rope_parameters": UNSCALED}),
    ("InternVL", "language_model", GROUPED | {"model_type": "qwen2"}),
    ("Kimi_K25", "language_model", LATENT | {"model_type": "deepseek_v3"}),
    ("Llama4", "language_model", MIXED | {"intermediate_size_mlp": 80, "interleave_moe_layer_step": 2}),
    ("Llava", "language_model", GROUPED | {"model_type": "llama"}),
    ("Mistral3", "language_model", GROUPED | {"model_type": "mistral", "head_dim": 24}),
    ("Mistral3", "language_model", GROUPED | {"model_type": "ministral3", "head_dim": 24}),
    ("Qwen2VL", "language_model", GROUPED), ("Qwen2_5_VL", "language_model", GROUPED),
    ("Qwen3VL", "language_model", GROUPED), ("Qwen3VLMoe", "language_model", QWEN_MOE),
]  # fmt: skip


@pytest.mark.parametrize(("name", "part", "text"), NESTED, ids=[case[0] for case in NESTED])
@pytest.mark.parametrize("tied", [True, False])
def test_the_text_model_of_a_nested_config_is_counted(name, part, text, tied):
    transformers = pytest.importorskip("transformers")
    import torch

    kind = getattr(transformers, f"{name}Config")
    built = kind(text_config={**text, "tie_word_embeddings": tied}, tie_word_embeddings=tied)
    with torch.device("meta"):
        model = getattr(transformers, f"{name}ForConditionalGeneration")(built)
    read = getattr(getattr(model, "model", model), part)
    head = sum(p.numel() for n, p in model.named_parameters() if "lm_head" in n)
    counted = parameters(built.to_dict())
    in_text = {id(p): p.numel() for p in read.parameters()}
    expected = sum(in_text.values()) + (0 if "lm_head" in dict(read.named_modules()) else head)
    assert counted.total == expected
    assert counted.head == (0 if tied else 160 * 64)


def test_the_outer_config_says_whether_the_embedding_is_shared():
    inner = {"model_type": "mistral", **GROUPED}
    shared = parameters({"model_type": "mistral3", "text_config": inner, "tie_word_embeddings": True})
    own = parameters({"model_type": "mistral3", "text_config": inner})
    assert own.total - shared.total == 160 * 64
    for key in ("llm_config", "language_config"):
        assert parameters({"model_type": "a-model-of-images", key: inner}) == own


def test_layers_of_a_hybrid_are_told_apart():
    config = {"model_type": "qwen3_next", **QWEN_MOE, **DELTA}
    assert [bool(layer.recurrent) for layer in shapes(config).layers] == [True, True, True, False]
    config |= {"layer_types": ["full_attention"] + ["linear_attention"] * 3}
    assert [bool(layer.recurrent) for layer in shapes(config).layers] == [False, True, True, True]


def test_layers_of_llama4_see_their_chunk_or_everything():
    config = {"model_type": "llama4", **MIXED, "intermediate_size_mlp": 80, "attention_chunk_size": 8}
    assert [layer.window for layer in shapes(config).layers] == [8, 8, 8, None]
    assert [layer.chunked for layer in shapes(config).layers] == [True, True, True, False]
    every_other = shapes(config | {"interleave_moe_layer_step": 2})
    assert [layer.sparse for layer in every_other.layers] == [False, True, False, True]
    rotated = shapes(config | {"no_rope_layers": [0, 1, 1, 1]})
    assert [layer.window for layer in rotated.layers] == [None, 8, 8, 8]
    assert shapes(config | {"no_rope_layers": 3, "moe_layers": 3}) == shapes(
        config
    )  # no lists, as if left out


def test_a_hint_is_a_family_of_the_same_kind_or_none():
    """No other network that transformers knows is taken for a slip of the pen."""
    transformers = pytest.importorskip("transformers")
    others = set(transformers.CONFIG_MAPPING) - set(FAMILIES) - set(TEXT_MODELS)
    assert len(others) > 200
    for name in others:
        with pytest.raises(UserError) as caught:
            shapes({"model_type": name})
        assert "did you mean" not in str(caught.value), name


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("mamba", "recurrent state; of that kind qwen3_next is counted"), ("rwkv", "recurrent state"),
        ("bert", "is an encoder"), ("t5", "an encoder beside its decoder"), ("whisper", "images or sound"),
        ("lama", "did you mean llama?"), ("LLaMA", "did you mean llama?"), ("qwen-3", "did you mean qwen3?"),
        ("mistrall", "did you mean mistral?"), ("llava-of-mine", "'llava-of-mine': The types known"),
        ("qwen4", "'qwen4': The types known"),
    ],
)  # fmt: skip
def test_an_unknown_family_is_told_apart_by_its_kind(name, said):
    with pytest.raises(UserError) as caught:
        shapes({"model_type": name})
    assert said in str(caught.value)
    assert "types known are llama" in str(caught.value)


def test_every_other_kind_exists_and_is_not_counted():
    transformers = pytest.importorskip("transformers")
    assert set(OTHER_KINDS) <= set(transformers.CONFIG_MAPPING) - set(FAMILIES)


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
        ({"model_type": ["llama"]}, r"\['llama'\]"),
        ({"model_type": "anything", "text_config": {"hidden_size": 8}}, "None"),
        ({"model_type": "qwen3_next", "layer_types": 3}, "linear_num_value_heads: None"),
        ({"model_type": "deepseek_v32", **LATENT}, "index_n_heads: None"),
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
