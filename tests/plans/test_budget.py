import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farthing.cost import devices
from farthing.plans.budget import CHINCHILLA, REFIT, budget, budget_text, deepseek_split, served_split

FLOPS = st.floats(1e17, 1e26)


@pytest.mark.parametrize("law", [CHINCHILLA, REFIT], ids=lambda law: law.name)
@given(flops=FLOPS)
def test_a_split_spends_everything_and_no_other_does_better(law, flops):
    parameters, tokens = law.split(flops)
    assert 6 * parameters * tokens == pytest.approx(flops)
    for factor in (0.9, 1.1):
        assert law.loss(parameters * factor, tokens / factor) >= law.loss(parameters, tokens)


def test_the_refit_agrees_with_the_rule_of_twenty_tokens():
    parameters, tokens = REFIT.split(5.76e23)  # what Chinchilla itself was trained with: 70B on 1.4T
    assert tokens / parameters == pytest.approx(20, rel=0.15)
    assert parameters == pytest.approx(70e9, rel=0.1)


def test_deepseek_s_law_gives_its_own_67b():
    """arXiv:2401.02954: 4.5e23 FLOPs are best spent on about 4.3e11 FLOPs a token and 1.04T tokens."""
    parameters, tokens = deepseek_split(4.5e23)
    assert 6 * parameters == pytest.approx(4.3e11, rel=0.05)
    assert tokens == pytest.approx(1.04e12, rel=0.05)


@given(flops=st.floats(1e19, 1e25), share=st.floats(0.1, 20))
def test_use_makes_models_smaller(flops, share):
    trained, tokens = REFIT.split(flops)
    parameters, more = served_split(flops, share * tokens)
    assert parameters < trained
    spent = 6 * parameters * more + 2 * parameters * share * tokens
    assert spent == pytest.approx(flops)


def test_as_much_use_as_training_is_three_quarters_of_the_money():
    assert served_split(8e20, None) == pytest.approx(REFIT.split(6e20))


def test_money_buys_hours_and_hours_buy_flops():
    device = devices.find("h100")
    found = budget(5000, device, 2.5, "given")
    assert found.device_hours == 2000
    assert found.flops.likely == pytest.approx(2000 * 3600 * 989e12 * found.efficiency.likely)
    assert found.flops.low < found.flops.likely < found.flops.high
    twice = budget(10_000, device, 2.5, "given")
    for little, much in zip(found.choices, twice.choices, strict=True):
        assert much.parameters.likely > little.parameters.likely
        assert much.tokens.likely > little.tokens.likely
    json.dumps(found.as_json(), allow_nan=False)


def test_every_law_is_shown_with_its_source():
    found = budget(5000, devices.find("h100"), 2.5, "given", inference_tokens=1e12)
    text = budget_text(found)
    for choice in found.choices:
        assert choice.law in text
        assert choice.source.split()[0] in text
    assert "1T" in text
