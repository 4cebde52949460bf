"""How narrow layers go, beside the wider ones that `calibrate` times.

A layer's products grow with the square of its width, the rest of its work (norms, rotations, activations, documents
that attend to themselves only) with the width itself: a FLOP of a narrow layer takes longer. And a mixture of experts
sorts and moves its tokens, whatever the products take. Both are measured on layers of a small DeepSeek-V3 in training:

    narrow   seconds a FLOP of a dense layer 128 wide; between that width and the one of `calibrate`, the logarithm goes
             with that of the width, and below it seconds go with the width
    route    seconds a token of a layer with experts beyond its FLOPs
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from farthing.base.device import Alone, Place
from farthing.cost.flops import causal_pairs, forward_flops
from farthing.plans.measured import timed

if TYPE_CHECKING:
    from farthing.data.packing import PackedBatch

WIDE, NARROW = 576, 128  # widths of the network that is timed in full, and of the small one
DOCUMENTS = [24 + 29 * number % 97 for number in range(60)]
"""Tokens of each in a pass: of many lengths, as texts are, since equal ones are attended to as one batch."""
TOKENS = sum(DOCUMENTS)  # more than fit in a core's cache, as in a run's passes
KINDS = {"one dense": (1, 1), "two dense": (2, 2), "dense and sparse": (2, 1)}
"""Networks that are timed: their layers, and how many of them are dense."""


def config(layers: int, dense: int) -> dict[str, Any]:
    """A small DeepSeek-V3, as the dial makes them."""
    return {
        "model_type": "deepseek_v3",
        "vocab_size": 320,
        "hidden_size": NARROW,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "intermediate_size": 3 * NARROW,
        "moe_intermediate_size": NARROW,
        "n_routed_experts": 16,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": dense,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "q_lora_rank": None,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
    }


def flops(kind: str) -> float:
    """FLOPs of a pass of training through the layers of one of `KINDS`."""
    pairs = sum(causal_pairs(length) for length in DOCUMENTS)
    return 3.0 * forward_flops(config(*KINDS[kind]), TOKENS, pairs, 0)


def passes(place: Place) -> dict[str, tuple[float, Callable[[], float]]]:
    """The FLOPs of a pass through each of `KINDS`, and what does it and says its seconds."""
    batch = _batch()
    return {kind: (flops(kind), _training(kind, place, batch)) for kind in KINDS}


def solve(seconds: Mapping[str, float]) -> tuple[float, float]:
    """`narrow` and `route` from the seconds of each of `KINDS`. Not even noise makes `route` negative."""
    one, two, sparse = (seconds[kind] for kind in KINDS)
    work, more, routed = (flops(kind) for kind in KINDS)
    narrow = max(0.0, two - one) / (more - work)
    return narrow, max(0.0, sparse - one - narrow * (routed - work)) / TOKENS


def pace(flop: float, narrow: float, width: int) -> float:
    """Seconds a FLOP of layers so wide, where those of `WIDE` take `flop`; `narrow` 0 says that none were measured."""
    if not narrow or width >= WIDE:
        return flop
    t = min(1.0, math.log(WIDE / width) / math.log(WIDE / NARROW))
    return narrow**t * flop ** (1 - t) * max(1.0, NARROW / width)


def _batch() -> PackedBatch:
    import torch

    from farthing.data.packing import NO_LOSS, PackedBatch

    ids = torch.randint(320, (TOKENS,), generator=torch.Generator().manual_seed(0))
    documents = torch.arange(len(DOCUMENTS)).repeat_interleave(torch.tensor(DOCUMENTS))
    ends = torch.tensor(DOCUMENTS).cumsum(0) - 1
    targets = ids.roll(-1).index_fill(0, ends, NO_LOSS)
    return PackedBatch(ids, targets, documents, DOCUMENTS, DOCUMENTS, max(DOCUMENTS))


def _training(kind: str, place: Place, batch: PackedBatch) -> Callable[[], float]:
    from farthing.model import Decoder
    from farthing.train.lm import lm_step
    from farthing.weights import decoder_config

    network = config(*KINDS[kind])
    decoder = Decoder(decoder_config(network))
    decoder.init_weights(0, 0.04)
    decoder.to(place.torch_dtype)
    return lambda: timed(lambda: lm_step(decoder, batch, network, TOKENS, balance=1e-4, ranks=Alone("cpu")))
