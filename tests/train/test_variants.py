"""The networks of a study: equal active parameters whatever the size, and what does not fit is refused."""

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from farthing.base.errors import UserError
from farthing.cost.flops import parameters
from farthing.recipe import Study, validate
from farthing.stages.variants import TOLERANCE, Variant, active_parameters, variants

FAMILIES = ["dense", "moe", "moe+mla", "moe+mla+mtp"]


def study(**keys: Any) -> Study:
    stage = {"kind": "study", "data": ["x"], "size": "1M", "tokens": "800K", "length": 256}
    made = validate({"name": "t", "stages": [stage | keys]}).stages[0]
    assert isinstance(made, Study)
    return made


def by_family(found: list[Variant]) -> dict[str, Variant]:
    return {variant.family: variant for variant in found}


@given(size=st.integers(300_000, 2_000_000_000))
@settings(max_examples=15, deadline=None)
def test_every_family_has_the_size_and_the_same_shape(size: int) -> None:
    found = variants(study(size=size, optimizers={"muon": None}), 2048)
    assert [variant.family for variant in found] == FAMILIES
    for variant in found:
        assert active_parameters(variant.dialled.config) == pytest.approx(size, rel=TOLERANCE)
    for key in ("num_hidden_layers", "hidden_size", "tie_word_embeddings", "vocab_size"):
        assert len({variant.dialled.config[key] for variant in found}) == 1, key
    plans = {
        (v.dialled.steps, v.dialled.batch_tokens, v.dialled.warmup, v.dialled.lr, v.stage.schedule)
        for v in found
    }
    assert len(plans) == 1
    assert found[0].stage.schedule == "constant"


def test_the_families_differ_in_what_they_are_named_for() -> None:
    found = by_family(variants(study(optimizers={"adamw": 1e-3}), 2048))
    configs = {family: variant.dialled.config for family, variant in found.items()}
    assert [configs[family]["model_type"] for family in FAMILIES] == [
        "llama", "glm4_moe", "deepseek_v3", "deepseek_v3",
    ]  # fmt: skip
    assert configs["moe+mla"]["num_nextn_predict_layers"] == 0
    assert configs["moe+mla+mtp"]["num_nextn_predict_layers"] == 1
    total = {family: parameters(config).total for family, config in configs.items()}
    assert total["moe"] > 2 * total["dense"]  # the experts that wait
    assert parameters(configs["moe+mla+mtp"]).mtp > 0
    assert {variant.stage.lr for variant in found.values()} == {1e-3}


def test_what_is_left_out_follows_from_the_size() -> None:
    small, large = (variants(study(size=size, tokens=None), 2048)[0] for size in ("1M", "4M"))
    assert small.dialled.tokens == pytest.approx(20e6, rel=0.01)
    assert large.dialled.tokens == pytest.approx(80e6, rel=0.01)
    # DeepSeek LLM's law: sixteen times the compute, 16^-0.125 times the rate and 16^0.3271 times the batch
    assert large.dialled.lr / small.dialled.lr == pytest.approx(16**-0.125, rel=0.05)
    assert math.log(large.dialled.batch_tokens / small.dialled.batch_tokens, 16) == pytest.approx(
        0.33, abs=0.05
    )


def test_optimizers_with_their_rates() -> None:
    found = variants(study(optimizers={"adamw": 2e-3, "muon": 5e-3}, families=["moe", "dense"]), 2048)
    assert [(v.optimizer, v.family, v.dialled.lr) for v in found] == [
        ("adamw", "moe", 2e-3), ("adamw", "dense", 2e-3), ("muon", "moe", 5e-3), ("muon", "dense", 5e-3),
    ]  # fmt: skip


def test_a_size_that_cannot_be_is_refused() -> None:
    with pytest.raises(
        UserError, match="size: no dense network of 1 layers and width 64 comes within 2% of 5,000"
    ):
        variants(study(size=5000), 512)
