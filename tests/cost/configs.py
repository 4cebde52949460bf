"""Models of 15 to 135 million parameters, one for each way of computing, for the tests of memory."""

_BASE = {
    "model_type": "llama", "vocab_size": 8192, "hidden_size": 384, "intermediate_size": 1024,
    "num_hidden_layers": 8, "num_attention_heads": 6, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 2048, "rope_theta": 1e4, "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip
_EXPERTS = {
    "n_shared_experts": 1, "n_routed_experts": 16, "num_experts_per_tok": 2, "first_k_dense_replace": 1,
    "n_group": 1, "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 1.41,
}  # fmt: skip
CONFIGS = {
    "llama-19m": _BASE,
    "qwen3-48m": _BASE | {
        "model_type": "qwen3", "vocab_size": 32000, "hidden_size": 512, "head_dim": 64,
        "num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 1536,
        "num_hidden_layers": 10, "tie_word_embeddings": True,
    },
    "smollm2-135m": _BASE | {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
    },
    "deepseek-18m": _BASE | _EXPERTS | {
        "model_type": "deepseek_v3", "hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 8,
        "num_key_value_heads": 8, "moe_intermediate_size": 128, "q_lora_rank": None, "kv_lora_rank": 96,
        "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32, "scoring_func": "sigmoid",
        "topk_method": "noaux_tc", "num_nextn_predict_layers": 1,
    },
    "glm-46m": _BASE | _EXPERTS | {
        "model_type": "glm4_moe", "vocab_size": 16000, "moe_intermediate_size": 256, "head_dim": 64,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0},
    },
}  # fmt: skip
