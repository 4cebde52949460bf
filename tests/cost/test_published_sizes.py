"""Networks of published sizes, against what transformers builds of the same config and the totals their makers give."""

import pytest

from farthing.cost.flops import parameters

# The differences of each config.json from the defaults of transformers 5.23, which are a published model's; the
# maker's parameters in total and active, in units of 1e9; the source.
PUBLISHED = [
    ("GptOss", {}, 116.83, 5.13, "gpt-oss-120b, arXiv:2508.10925 table 1"),
    ("GptOss", {"num_hidden_layers": 24, "num_local_experts": 32}, 20.91, 3.61, "gpt-oss-20b, the same table"),
    ("Qwen3Next", {}, 80, 3, "Qwen3-Next-80B-A3B, its name; without multi-token prediction"),
    ("Llama4", {}, 109, 17, "Llama 4 Scout, its model card; with the image model"),
    ("Llama4", {"num_local_experts": 128, "interleave_moe_layer_step": 2}, 400, 17, "Llama 4 Maverick, the same"),
    (
        "Dots1",
        {"hidden_size": 4096, "n_routed_experts": 128, "n_shared_experts": 2, "num_experts_per_tok": 6,
         "first_k_dense_replace": 1},
        142, 14, "dots.llm1, arXiv:2506.05767",
    ),
    ("Phimoe", {"attention_bias": True, "lm_head_bias": True}, 41.9, 6.6, "Phi-3.5-MoE, arXiv:2404.14219"),
    (
        "GraniteMoe",
        {"vocab_size": 49155, "hidden_size": 1536, "intermediate_size": 512, "num_attention_heads": 24,
         "num_key_value_heads": 8, "num_local_experts": 40, "num_experts_per_tok": 8, "tie_word_embeddings": True},
        3.3, 0.8, "Granite 3.0 3B-A800M, its model card",
    ),
    ("DeepseekV32", {}, 671, 37, "DeepSeek-V3, arXiv:2412.19437, of which this is the network and an indexer"),
    ("MiniMaxM2", {}, 230, 10, "MiniMax-M2, its model card"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "config", "total", "active", "source"), PUBLISHED, ids=[p[4] for p in PUBLISHED]
)
def test_a_published_network_has_the_parameters_it_is_said_to(name, config, total, active, source):
    transformers = pytest.importorskip("transformers")
    import torch

    built = getattr(transformers, {"Llama4": "Llama4TextConfig"}.get(name, f"{name}Config"))(**config)
    with torch.device("meta"):
        model = getattr(transformers, f"{name}ForCausalLM")(built)
    counted = parameters(built.to_dict())
    assert counted.total == sum(p.numel() for p in model.parameters())
    assert counted.total / 1e9 == pytest.approx(total, rel=0.015)
    # some leave out the embedding, and most round to 1e9
    low, high = (counted.active - counted.embedding) / 1e9, counted.active / 1e9
    if isinstance(active, float):
        assert active == pytest.approx(low, abs=0.01) or active == pytest.approx(high, abs=0.05)
    else:
        assert low - 0.6 <= active <= high + 0.1


def test_a_gemma_config_that_leaves_sizes_out_is_counted():
    """gemma-3-4b-it's config.json gives its text model no vocabulary and no heads."""
    text = {
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
    }
    counted = parameters({"model_type": "gemma3", "text_config": text})
    # arXiv:2503.19786 table 1 gives 3209 M without the embedding and 675 M in it, of 262144 rows
    assert counted.total - counted.embedding == pytest.approx(3.209e9, rel=1e-3)
    assert counted.embedding == 262208 * 2560
