"""GLM-4-MoE's folders: grouped-query attention with V3's mixture of experts, as transformers computes it."""

from typing import Any

import pytest
import torch
from transformers import Glm4MoeConfig

from farthing.base.errors import UserError
from farthing.model import Decoder
from farthing.weights import decoder_config, load_decoder, save_decoder
from farthing.weights.folder import read_config

SMALL: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "n_shared_experts": 1,
    "n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "max_position_embeddings": 256,
}  # fmt: skip
WHOLE = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}
YARN = {
    **WHOLE, "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32
}  # fmt: skip


def glm(**changed: Any) -> Glm4MoeConfig:
    return Glm4MoeConfig(**{**SMALL, "rope_parameters": WHOLE, **changed})


CASES = {
    "glm": glm(),
    "norms-on-q-and-k": glm(use_qk_norm=True, routed_scaling_factor=2.5),
    "biases": glm(attention_bias=True, num_key_value_heads=1),
    "groups-and-two-shared": glm(n_group=4, topk_group=2, n_shared_experts=2, norm_topk_prob=False),
    "wide-heads-tied": glm(head_dim=12, tie_word_embeddings=True, first_k_dense_replace=0),
    "yarn": glm(rope_parameters=YARN),
    "half-heads": glm(
        rope_parameters={**WHOLE, "partial_rotary_factor": 0.5}, use_qk_norm=True, attention_bias=True
    ),
}


@pytest.fixture(scope="module", params=CASES, ids=list(CASES))
def pair(request, pair_of):
    return pair_of(CASES[request.param])


def test_logits_equal_transformers(pair, same):
    same.logits(pair)


def test_gradients_equal_transformers(pair, same):
    same.gradients(pair, "padded")


def test_saved_folder_loads_in_transformers_with_no_key_left_over(pair, same):
    same.saved(pair)


def test_whole_heads_are_written_where_every_reader_looks(tmp_path):
    """The key is beside the others in older folders, among the rotary settings in newer ones; its default is a half."""
    hf = glm().to_dict()
    decoder = Decoder(decoder_config(hf))
    decoder.init_weights(seed=0)
    written = read_config(save_decoder(decoder, hf, tmp_path / "model", None))
    assert written["partial_rotary_factor"] == written["rope_parameters"]["partial_rotary_factor"] == 1.0
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == 1e4
    assert written["rope_scaling"] is None
    assert written["num_nextn_predict_layers"] == 0
    back = load_decoder(tmp_path / "model", torch.float32)
    assert back.config == decoder.config
    for ours, theirs in zip(back.parameters(), decoder.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("rope", [{"rope_theta": 1e4}, {**WHOLE, "partial_rotary_factor": 0.5}])
def test_half_of_each_head_rotates_unless_the_folder_says_otherwise(rope):
    config = decoder_config(SMALL | {"model_type": "glm4_moe", "rope_parameters": rope})
    assert config.rope.share == 0.5


@pytest.mark.parametrize(
    "key", ["n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "hidden_size"]
)
def test_a_key_that_is_missing_is_named(key):
    hf = SMALL | {"model_type": "glm4_moe", "rope_parameters": WHOLE}
    del hf[key]
    with pytest.raises(UserError, match=f"has no '{key}'"):
        decoder_config(hf)
