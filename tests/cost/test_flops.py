import pytest
from hypothesis import given
from hypothesis import strategies as st

from farthing.cost.flops import FAMILIES, backward_flops, causal_pairs, forward_flops, parameters
from farthing.errors import UserError

TINY = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
}
VARIANTS = [
    {"model_type": "llama"},
    {"model_type": "llama", "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    {"model_type": "llama", "head_dim": 24, "num_key_value_heads": 1},
    {"model_type": "mistral", "head_dim": 8},
    {"model_type": "qwen2", "tie_word_embeddings": True},
    {"model_type": "qwen3", "head_dim": 32},
    {"model_type": "qwen3", "attention_bias": True},
]


def _model(config, **more):
    transformers = pytest.importorskip("transformers")
    names = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
    family = names[config["model_type"]]
    settings = {key: value for key, value in config.items() if key != "model_type"}
    built = getattr(transformers, f"{family}Config")(**settings, **more)
    return getattr(transformers, f"{family}ForCausalLM")(built), built


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_parameters_are_exact(variant):
    config = TINY | variant
    model, built = _model(config)
    total = sum(p.numel() for p in model.parameters())
    counted = parameters(config)
    assert counted.total == counted.active == total
    assert parameters(built.to_dict()) == counted
    assert counted.embedding == model.get_input_embeddings().weight.numel()
    assert counted.head == (0 if config.get("tie_word_embeddings") else 320 * 64)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_flops_match_torch_counter(variant):
    """Within 1% of torch.utils.flop_counter, forward, and forward with backward.

    The counter gives 0 for SDPA on a CPU (pytorch#195460), so the attention is the eager one; it knows no
    mask and counts all L*L pairs, so that is what `pairs` is here instead of `causal_pairs`.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    config = TINY | variant
    model, _ = _model(config, attn_implementation="eager")
    B, L = 2, 48
    ids_BL = torch.randint(0, 320, (B, L))
    with FlopCounterMode(display=False) as forward:
        logits_BLV = model(ids_BL).logits
    expected = forward_flops(config, tokens=B * L, pairs=B * L * L, logit_tokens=B * L)
    assert forward.get_total_flops() == pytest.approx(expected, rel=0.01)

    with FlopCounterMode(display=False) as backward:
        logits_BLV.sum().backward()
    expected = backward_flops(config, tokens=B * L, pairs=B * L * L, logit_tokens=B * L)
    assert backward.get_total_flops() == pytest.approx(expected, rel=0.01)


def test_llama_3_1_8b_by_hand():
    """51.5 GFLOP a token at 8K, causal: the figure of Megatron's formula for this model."""
    config = {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    }
    assert parameters(config).total == 8_030_261_248
    tokens = 8192
    step = (tokens, causal_pairs(tokens), tokens)
    per_token = (forward_flops(config, *step) + backward_flops(config, *step)) / tokens
    assert per_token == pytest.approx(51.5e9, rel=0.002)


@given(new=st.integers(0, 300), prefix=st.integers(0, 300), cut=st.integers(0, 300))
def test_pairs_count_every_cell_of_the_mask_and_add_up(new, prefix, cut):
    assert causal_pairs(new, prefix) == sum(prefix + i + 1 for i in range(new))
    cut = min(cut, new)
    assert causal_pairs(cut, prefix) + causal_pairs(new - cut, prefix + cut) == causal_pairs(new, prefix)


@given(prompt=st.integers(1, 64), generated=st.integers(1, 64))
def test_decoding_token_by_token_costs_what_one_pass_costs(prompt, generated):
    config = TINY | {"model_type": "llama"}
    whole = forward_flops(config, prompt + generated, causal_pairs(prompt + generated), 1 + generated)
    steps = forward_flops(config, prompt, causal_pairs(prompt), 1)
    steps += sum(forward_flops(config, 1, causal_pairs(1, prompt + i), 1) for i in range(generated))
    assert steps == whole


def test_mistakes_are_named():
    for family in FAMILIES:
        assert parameters(TINY | {"model_type": family}).total > 0
    with pytest.raises(UserError, match=r"'gpt2'.*llama"):
        parameters(TINY | {"model_type": "gpt2"})
    with pytest.raises(UserError, match="intermediate_size: None"):
        forward_flops(TINY | {"model_type": "llama", "intermediate_size": None}, 1, 1, 1)
    with pytest.raises(ValueError, match="negative"):
        forward_flops(TINY | {"model_type": "llama"}, -1, 0, 0)
    with pytest.raises(ValueError, match="negative"):
        causal_pairs(1, -1)
