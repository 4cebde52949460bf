"""The closed forms against torch.utils.flop_counter, forward and backward, on every family that Farthing runs.

The counter gives 0 for SDPA on a CPU (pytorch#195460), so attention is the eager one or SDPA's math backend; it
knows no mask and counts all pairs, so it is `model_full` that it must agree with.
"""

from contextlib import nullcontext

import pytest

from farthing.cost.flops import Flops, flops, mtp_flops

torch = pytest.importorskip("torch")

ROWS, LENGTH = 4, 64
TOKENS = ROWS * LENGTH
DENSE = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "hidden_act": "silu",
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0,
}  # fmt: skip
# 256 tokens for 2 of 8 experts are 64 rows an expert, when they are spread evenly: no row is there to fill
EXPERTS = {
    "n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 48,
    "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1, "routed_scaling_factor": 2.5,
}  # fmt: skip
# values as wide as keys: torch's CPU kernels would have ours filled up, and count what fills them
LATENT = DENSE | EXPERTS | {
    "q_lora_rank": 32, "kv_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 24,
    "num_key_value_heads": 4,
}  # fmt: skip
GROUPED_EXPERTS = DENSE | EXPERTS | {
    "head_dim": 24, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}
}  # fmt: skip
CASES = {
    "llama": ("Llama", DENSE | {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", DENSE | {"head_dim": 8}),
    "qwen2": ("Qwen2", DENSE | {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", DENSE | {"head_dim": 32}),
    "deepseek_v2": (
        "DeepseekV2",
        LATENT | {"q_lora_rank": None, "topk_method": "greedy", "n_group": None, "topk_group": None},
    ),
    "deepseek_v3": ("DeepseekV3", LATENT | {"num_nextn_predict_layers": 1}),
    "glm4_moe": ("Glm4Moe", GROUPED_EXPERTS),
}


def _counted(run, *, math=False):
    """FLOPs of what `run` does, and of the backward pass from what it returns."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    with sdpa_kernel(SDPBackend.MATH) if math else nullcontext():
        with FlopCounterMode(display=False) as forward:
            out = run()
        with FlopCounterMode(display=False) as backward:
            out.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


@pytest.mark.parametrize("family", CASES)
def test_transformers_models(family):
    transformers = pytest.importorskip("transformers")
    name, config = CASES[family]
    built = getattr(transformers, f"{name}Config")(
        **config, attn_implementation="eager", experts_implementation="eager"
    )
    model = getattr(transformers, f"{name}ForCausalLM")(built)
    ids = torch.randint(0, 320, (ROWS, LENGTH))
    expected = flops(built.to_dict(), [LENGTH] * ROWS, "forward", mtp=False).model_full
    forward, backward = _counted(lambda: model(ids).logits)
    assert forward == pytest.approx(expected, rel=0.01)
    assert backward == pytest.approx(2 * expected, rel=0.01)


@pytest.mark.parametrize("family", CASES)
def test_our_decoder(family, plain_torch):
    """In plain torch, since the counter knows nothing of oneDNN's own products."""
    from farthing.model import Decoder, Routing, Segments
    from farthing.weights import decoder_config

    config = {"model_type": family, "rms_norm_eps": 1e-5, "rope_theta": 1e4} | CASES[family][1]
    decoder = Decoder(decoder_config(config))
    decoder.init_weights(seed=0)
    segments = Segments([(LENGTH, ())] * ROWS)
    positions, ids = segments.positions(), torch.randint(0, 320, (TOKENS,))
    even = torch.stack([torch.arange(TOKENS) % 8, (torch.arange(TOKENS) + 1) % 8], 1)
    routing = Routing(replay=dict.fromkeys(range(5), even))

    def run():
        return decoder.logits(decoder.hidden(ids, positions, segments, routing))

    expected = flops(config, [LENGTH] * ROWS, "forward", mtp=False).model_full
    forward, backward = _counted(run, math=True)
    assert forward == pytest.approx(expected, rel=0.01)
    assert backward == pytest.approx(2 * expected, rel=0.01)


def test_our_multi_token_prediction(plain_torch):
    from farthing.model import Decoder, Routing, Segments
    from farthing.weights import decoder_config

    config = {"model_type": "deepseek_v3", "rms_norm_eps": 1e-5, "rope_theta": 1e4} | CASES["deepseek_v3"][1]
    decoder = Decoder(decoder_config(config))
    decoder.init_weights(seed=0)
    segments = Segments([(LENGTH, ())] * ROWS)
    positions, ids = segments.positions(), torch.randint(0, 320, (TOKENS,))
    even = torch.stack([torch.arange(TOKENS) % 8, (torch.arange(TOKENS) + 1) % 8], 1)
    routing = Routing(replay=dict.fromkeys(range(5), even))
    hidden = decoder.hidden(ids, positions, segments, routing).detach().requires_grad_()

    def run():
        return decoder.logits(decoder.mtp_hidden(0, ids, hidden, positions, segments, routing))

    expected = mtp_flops(config, TOKENS, ROWS * LENGTH * LENGTH, TOKENS)
    assert expected == flops(config, [LENGTH] * ROWS, "forward").mtp_full
    forward, backward = _counted(run, math=True)
    assert forward == pytest.approx(expected, rel=0.01)
    assert backward == pytest.approx(2 * expected, rel=0.01)


def test_absorbed_decoding_of_our_decoder(plain_torch):
    """One new token a sequence on cached latents, the form in which the engine decodes."""
    from farthing.cost.flops import decode_flops
    from farthing.engine.cache import Decode, PagedCache
    from farthing.model import Decoder
    from farthing.weights import decoder_config

    config = {"model_type": "deepseek_v2", "rms_norm_eps": 1e-5, "rope_theta": 1e4} | CASES["deepseek_v2"][1]
    decoder = Decoder(decoder_config(config | {"n_routed_experts": None}))
    decoder.init_weights(seed=0)
    cache = PagedCache(decoder.config, 16, 16, torch.float32, torch.device("cpu"))
    context = 63  # with the new token four whole pages
    tables = [list(range(4 * row, 4 * row + 4)) for row in range(ROWS)]
    attend = Decode(cache, tables, [[context]] * ROWS)

    def run():
        ids = torch.zeros(ROWS, dtype=torch.int64)
        return decoder.logits(decoder.hidden(ids, attend.positions, attend))

    expected = sum([decode_flops(config | {"n_routed_experts": None}, context)] * ROWS, Flops()).model
    with torch.no_grad():
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.utils.flop_counter import FlopCounterMode

        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            run()
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.01)
