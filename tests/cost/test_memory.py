import importlib.util
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farthing.base.errors import UserError
from farthing.base.sizes import LOGIT_BYTES, SHORT_LENGTH
from farthing.cost.activations import layer_bytes
from farthing.cost.flops import parameters
from farthing.cost.memory import Layout, cache_bytes_per_token, memory, tokens_per_pass
from farthing.cost.shapes import shapes

LLAMA_3_1_8B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
}  # fmt: skip
V3 = {
    "model_type": "deepseek_v3", "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432,
    "moe_intermediate_size": 2048, "num_hidden_layers": 61, "num_attention_heads": 128,
    "num_key_value_heads": 128, "n_shared_experts": 1, "n_routed_experts": 256, "num_experts_per_tok": 8,
    "first_k_dense_replace": 3, "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128, "v_head_dim": 128, "num_nextn_predict_layers": 1,
}  # fmt: skip
SMALL = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4, "hidden_act": "silu",
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24, "vocab_size": 320,
    "rms_norm_eps": 1e-5, "rope_theta": 1e4, "max_position_embeddings": 2048,
}  # fmt: skip
LATENT = SMALL | {
    "model_type": "deepseek_v3", "kv_lora_rank": 40, "q_lora_rank": 48, "qk_rope_head_dim": 8, "head_dim": 8,
    "qk_nope_head_dim": 16, "v_head_dim": 20, "num_key_value_heads": 4, "n_routed_experts": 8,
    "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 40, "first_k_dense_replace": 9,
    "n_group": 1, "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 1.0,
    "scoring_func": "sigmoid", "topk_method": "noaux_tc",
}  # fmt: skip
OURS = {
    "grouped": SMALL,
    "normed heads": SMALL | {"model_type": "qwen3"},
    "latent": LATENT,
    "latent, no query rank": LATENT | {"q_lora_rank": None},
    "experts": LATENT | {"first_k_dense_replace": 0},
    "windows": SMALL | {"model_type": "mistral", "sliding_window": 40},
    "norms behind": SMALL | {"model_type": "olmo2"},
}


def _kept(config, dtype, lora, length):
    """Bytes a token that torch keeps for the backward pass of a third layer, every storage once. Tokens are spread
    over the experts in whole blocks, so that no row is there to fill."""
    import torch

    from farthing.model import Decoder, Routing, Segments
    from farthing.train.optim import add_lora
    from farthing.weights import decoder_config

    tokens = 2 * length

    def saved(layers):
        decoder = Decoder(decoder_config(config | {"num_hidden_layers": layers}))
        decoder.init_weights(seed=0)
        decoder = decoder.to(dtype)
        if lora:
            add_lora(decoder, lora, 1.0, seed=0)
        own = {parameter.untyped_storage().data_ptr() for parameter in decoder.parameters()}
        found = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                found[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no place is used twice
            return tensor

        even = torch.stack([torch.arange(tokens) % 8, (torch.arange(tokens) + 1) % 8], 1)
        segments = Segments([(length, ())] * 2)
        ids = torch.randint(config["vocab_size"], (tokens,))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            routing = Routing(replay=dict.fromkeys(range(layers), even))
            decoder.hidden(ids, segments.positions(), segments, routing)
        return sum(size for size, _ in found.values()) / tokens

    return saved(3) - saved(2)


@pytest.mark.parametrize(
    ("precision", "length"), [("bf16", 128), ("bf16", SHORT_LENGTH + 128), ("fp32", 128)]
)
@pytest.mark.parametrize("name", OURS)
def test_layers_keep_what_the_closed_form_says(name, precision, length):
    torch = pytest.importorskip("torch")
    config, dtype = OURS[name], {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    s = shapes(config)
    for lora in (0, 1):
        expected = layer_bytes(s, s.layers[-1], "none", "farthing-cpu", precision, length, trained=not lora)
        assert _kept(config, dtype, lora, length) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(
    ("kind", "optimizer", "precision"),
    [("pretrain", "adamw", "bf16"), ("pretrain", "muon", "fp32"), ("lora", "adamw", "bf16")],
)
@pytest.mark.parametrize("name", ["grouped", "experts"])
def test_states_are_what_the_optimizer_holds(name, kind, optimizer, precision):
    torch = pytest.importorskip("torch")
    from farthing.model import Decoder
    from farthing.train.optim import MasterWeights, add_lora
    from farthing.weights import decoder_config

    config = OURS[name]
    decoder = Decoder(decoder_config(config))
    decoder.init_weights(seed=0)
    decoder = decoder.to({"bf16": torch.bfloat16, "fp32": torch.float32}[precision])
    if kind == "lora":
        add_lora(decoder, 4, 8.0, seed=0)
    weights = MasterWeights(decoder, optimizer, 1e-3, (0.9, 0.95), 0.0)
    for master in weights.masters:
        master.copy.grad = torch.zeros_like(master.copy)
        master.fresh = False
    weights.step(1e-3)
    predicted = memory(
        config, kind=kind, micro_tokens=1, seq_len=1, precision=precision, optimizer=optimizer,
        code="farthing-cpu", lora_rank=4 if kind == "lora" else 0,
    )  # fmt: skip
    held = {p.data_ptr(): p.numel() * p.element_size() for p in decoder.parameters()}
    assert predicted.weights == pytest.approx(sum(held.values()), rel=0.01)
    assert predicted.gradients == sum(4 * master.copy.numel() for master in weights.masters)
    states = sum(4 * t.numel() for name, t in weights.state().items() if not name.endswith(".step"))
    assert predicted.optimizer == pytest.approx(states, rel=0.01)


@pytest.mark.parametrize("config", [LLAMA_3_1_8B, V3], ids=["llama", "v3"])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("kind", ["lora", "grpo"])
def test_a_pass_fills_its_memory_and_no_more(config, precision, kind):
    how = {"precision": precision, "code": "farthing-cpu", "kind": kind}
    tokens = tokens_per_pass(config, 8.0, length=128, lora=8, **how)

    def used(count):
        found = memory(config, micro_tokens=count, seq_len=128, lora_rank=8, **how)
        return found.activations + found.logits

    assert used(tokens) <= 8e9 < used(tokens + 1)
    assert tokens_per_pass(config, 1e-12, length=128, lora=8, **how) == 1


@pytest.mark.parametrize("vocab", [1000, 50_000, 250_000])
def test_every_shorter_pass_fits_too(vocab):
    """The most logits that are held at once take more than chunks of a few more."""
    how = {"precision": "bf16", "code": "farthing-cpu"}
    config = SMALL | {"vocab_size": vocab}
    for memory_gb in (0.6, 0.7, 0.8, 1.5):
        most = tokens_per_pass(config, memory_gb, length=64, lora=4, kind="sft", **how)
        for tokens in {most, min(most, LOGIT_BYTES // (2 * vocab)), most // 2}:
            used = memory(config, kind="lora", micro_tokens=tokens, seq_len=64, lora_rank=4, **how)
            assert used.activations + used.logits <= memory_gb * 1e9


@pytest.mark.parametrize("kind", ["pretrain", "grpo"])
def test_a_large_vocabulary_leaves_room_for_a_pass(kind):
    """The gradient of this head takes 2.3 GB, but no more for a longer pass."""
    qwen = SMALL | {
        "model_type": "qwen2", "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "head_dim": 128,
        "num_attention_heads": 12, "vocab_size": 151_936,
    }  # fmt: skip
    tokens = tokens_per_pass(qwen, 2.0, length=512, precision="bf16", code="farthing-gpu", kind=kind)
    assert 400 < tokens < 1000


def test_eighteen_bytes_a_parameter():
    predicted = memory(LLAMA_3_1_8B, micro_tokens=1, seq_len=1)
    states = predicted.weights + predicted.gradients + predicted.optimizer
    assert states == 18 * parameters(LLAMA_3_1_8B).total
    muon = memory(LLAMA_3_1_8B, micro_tokens=1, seq_len=1, optimizer="muon")
    assert 14 < (muon.weights + muon.gradients + muon.optimizer) / parameters(LLAMA_3_1_8B).total < 15


def states(**how):
    """Bytes a parameter of everything but activations."""
    found = memory(LLAMA_3_1_8B, micro_tokens=1, seq_len=1, **how)
    return (found.weights + found.gradients + found.optimizer) / parameters(LLAMA_3_1_8B).total


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({"precision": "pure-bf16"}, 8),
        ({"optimizer": "adamw-8bit"}, 12),  # two moments of a byte
        ({"precision": "pure-bf16", "optimizer": "adamw-8bit"}, 6),
        ({"offload": True}, 2),
        ({"layout": Layout(data=100, zero=3)}, 16 / 100),
        ({"layout": Layout(context=100, zero=3)}, 16 / 100),
        ({"layout": Layout(data=100, zero=3), "offload": True}, 0),
        ({"layout": Layout(data=100, zero=3), "precision": "pure-bf16"}, 8 / 100),
    ],
)
def test_bytes_a_parameter(how, expected):
    if "layout" in how:  # two layers, and embedding and head, are gathered
        s = shapes(LLAMA_3_1_8B)
        gathered = 2 * s.layers[0].parameters + 2 * s.vocab * s.embed + s.width
        expected += 2 * gathered / parameters(LLAMA_3_1_8B).total
    assert states(**how) == pytest.approx(expected, rel=0.01)


def test_a_frozen_base_takes_its_bits():
    def weights(bits):
        return memory(
            LLAMA_3_1_8B, kind="lora", lora_rank=1, micro_tokens=1, seq_len=1, base_bits=bits
        ).weights

    s = shapes(LLAMA_3_1_8B)
    inside, tables = sum(layer.parameters for layer in s.layers), 2 * s.vocab * s.embed
    at_work = 2 * 4096 * 14336  # the largest matrix, in bfloat16 while it is multiplied
    assert weights(16) == pytest.approx(2 * (inside + tables), rel=0.01)
    assert weights(8) == pytest.approx(inside + 2 * tables + at_work, rel=0.01)
    assert weights(4) == pytest.approx(4.127 / 8 * inside + 2 * tables + at_work, rel=0.01)


def test_logits_in_float32_and_fused():
    """Logits in bfloat16; the log-softmax, its gradient and theirs in float32: 14 bytes. With tensor parallelism the
    softmax too, and a part of the vocabulary on each rank. A fused loss: logits and their gradient."""
    logits = 65536 * LLAMA_3_1_8B["vocab_size"]
    how = {"micro_tokens": 65536, "seq_len": 65536, "recompute": "full"}
    assert memory(LLAMA_3_1_8B, **how).logits == 14 * logits
    split = memory(LLAMA_3_1_8B, layout=Layout(tensor=2), **how).logits
    whole_rows = 65536 * 4096 * 2 * 0.5
    assert split == 18 * logits / 2 + whole_rows
    few = memory(LLAMA_3_1_8B, scored_tokens=32768, **how)
    assert few.logits == 7 * logits
    fused = memory(LLAMA_3_1_8B, fused_loss=True, **how)
    assert fused.logits == 4 * logits


def test_deepseek_v3_fits_an_h800_as_it_was_trained():
    """16 pipeline stages, 64 expert ranks, ZeRO-1, FP8, no tensor parallelism (arXiv:2412.19437 sec. 3.2)."""
    layout = Layout(data=128, expert=64, pipeline=16, zero=1)
    assert layout.devices == 2048
    settings = {"micro_tokens": 4096, "seq_len": 4096, "precision": "fp8", "layout": layout}
    assert memory(V3, recompute="selective", **settings).total < 80e9
    assert memory(V3, recompute="none", **settings).total > 80e9
    assert memory(V3, recompute="selective", **settings | {"layout": Layout(data=2048, zero=1)}).total > 80e9


def test_caches_in_bytes_a_token():
    assert cache_bytes_per_token(V3) == 70_272  # DeepSeek-V3's latent and rotated key
    assert cache_bytes_per_token(LLAMA_3_1_8B) == 131_072
    assert cache_bytes_per_token(LLAMA_3_1_8B, "fp32") == 262_144
    served = memory(LLAMA_3_1_8B, kind="serve", micro_tokens=2048, seq_len=1000, cache_tokens=4500)
    assert served.cache == 5000 * 131_072  # whole sequences
    assert served.weights == 2 * parameters(LLAMA_3_1_8B).total
    assert served.gradients == served.optimizer == served.logits == 0
    reference = memory(LLAMA_3_1_8B, kind="grpo", micro_tokens=2048, seq_len=1024, reference=True)
    assert reference.weights == 2 * served.weights
    assert reference.cache == 2048 * 131_072


@given(
    data=st.sampled_from([1, 2, 4, 8]), tensor=st.sampled_from([1, 2, 4]), pipeline=st.sampled_from([1, 2, 4]),
    expert=st.sampled_from([1, 2]), zero=st.integers(0, 3),
)  # fmt: skip
def test_spreading_never_costs_states(data, tensor, pipeline, expert, zero):
    layout = Layout(data, min(expert, data), tensor, pipeline, zero)
    alone = memory(OURS["experts"], micro_tokens=64, seq_len=64)
    spread = memory(OURS["experts"], micro_tokens=64, seq_len=64, layout=layout)
    assert spread.optimizer <= alone.optimizer
    assert spread.gradients <= alone.gradients
    # all ranks together hold at least one copy of everything, and the fullest its share
    assert spread.optimizer >= 0.99 * alone.optimizer / layout.devices
    if zero and tensor == pipeline == 1:
        assert spread.optimizer == pytest.approx(alone.optimizer / data, rel=0.01)


@given(tokens=st.integers(1, 100_000), kind=st.sampled_from(["pretrain", "sft", "grpo", "serve"]))
def test_more_tokens_never_need_less(tokens, kind):
    small = memory(SMALL, kind=kind, micro_tokens=tokens, seq_len=64)
    large = memory(SMALL, kind=kind, micro_tokens=tokens + 64, seq_len=64)
    assert small.total <= large.total
    assert small.total == sum(small.parts().values())


def test_recomputation_is_ordered():
    for config in (LLAMA_3_1_8B, V3):
        kept = [
            memory(config, micro_tokens=8192, seq_len=8192, recompute=policy).activations
            for policy in ("none", "selective", "alternate", "full")
        ]
        assert kept == sorted(kept, reverse=True)
        assert kept[-1] < kept[0] / 2


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: Layout(tensor=0), "tensor is 0"),
        (lambda: Layout(zero=4), "zero is 4"),
        (lambda: Layout(context=0), "context is 0"),
        (
            lambda: memory(SMALL, micro_tokens=1, seq_len=1, base_bits=4),
            "weights of 4 bits cannot be trained",
        ),
        (lambda: Layout(data=4, expert=3), "3 expert ranks do not divide 4"),
        (lambda: memory(SMALL, micro_tokens=0, seq_len=1), "micro_tokens is 0"),
        (lambda: memory(SMALL, micro_tokens=1, seq_len=1, layout=Layout(pipeline=9)), "9 pipeline stages"),
        (lambda: memory(SMALL, kind="lora", micro_tokens=1, seq_len=1), "give lora_rank"),
    ],
)
def test_mistakes_are_one_sentence(call, sentence):
    with pytest.raises(UserError, match=sentence):
        call()


def test_the_configs_that_are_measured_run():
    """tests/cost/test_memory_measured.py takes minutes; that its models can be built is worth knowing sooner."""
    pytest.importorskip("torch")
    from farthing.weights import decoder_config

    spec = importlib.util.spec_from_file_location("configs", Path(__file__).with_name("configs.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert len(module.CONFIGS) == 5
    for config in module.CONFIGS.values():
        decoder_config(config)
        assert 5e6 < parameters(config).total < 150e6
