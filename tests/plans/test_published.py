import math

import pytest

from farthing.cost.devices import peak
from farthing.cost.flops import flops_per_token, parameters
from farthing.plans.published import published_runs, validation_runs

NAMED = {run.name: run for run in published_runs()}


def test_every_row_says_where_it_is_from_and_what_it_is_good_for():
    assert len(NAMED) == len(published_runs()) >= 50
    for run in published_runs():
        assert run.source, run.name
        assert run.evidence in ("P", "S", "R"), run.name
        assert run.laboratory, run.name
        assert run.use in ("test", "approximate", "steady", "computed", "implausible"), run.name
        assert run.scope in ("run", "card", "distilled", "steady"), run.name
        assert (run.tokens_per_second > 0) == (run.use == "steady"), run.name
        assert run.scope == "run" or run.notes, run.name


# GFLOP a token, causal, from the model's published sizes (cost.md's table, which was derived independently)
@pytest.mark.parametrize(
    ("name", "gigaflops"),
    [("deepseek-v3-pretrain", 250.45), ("llama3-8b", 51.47), ("llama3.2-1b", 9.025), ("bloom-176b", 1069.7)],
)
def test_flops_of_a_token_are_those_of_its_sizes(name, gigaflops):
    assert NAMED[name].per_token.model / 1e9 == pytest.approx(gigaflops, rel=2e-3)


def test_flops_agree_with_what_the_papers_state():
    stated = {run.name: run for run in published_runs() if run.reported_flops}
    assert len(stated) >= 6
    for run in stated.values():
        ratio = run.per_token.model * run.tokens / run.reported_flops
        # OPT and BloombergGPT count the forward pass that they computed twice: 4 passes of 3.
        expected = 0.745 if run.name in ("opt-175b", "bloomberggpt-50b") else 1.0
        assert ratio == pytest.approx(expected, abs=0.05), run.name


def test_what_is_implausible_is_not_tested_on_and_would_be_caught():
    impossible = NAMED["llmc-gpt3-125m"]
    assert impossible.mfu > 1
    assert impossible not in validation_runs()
    assert NAMED["llama3.3-70b"] not in validation_runs()
    assert all(0.05 < run.mfu < 0.65 for run in validation_runs())


def test_hours_computed_from_a_utilisation_are_no_evidence():
    for name in ("gpt3-175b", "mtnlg-530b", "nemotron4-340b"):
        assert NAMED[name].use == "computed", name
        assert "utilisation" in NAMED[name].notes, name
        assert NAMED[name] not in validation_runs()


@pytest.mark.parametrize(
    ("name", "active"),  # billions of parameters that a token passes, of the model cards
    [("dots1", 14), ("olmoe-1b-7b", 1.3), ("phi3.5-moe", 6.6), ("llama4-scout", 17)],
)
def test_a_mixture_is_counted_by_what_a_token_passes(name, active):
    run = NAMED[name]
    assert run.config is not None
    assert parameters(run.config).active / 1e9 == pytest.approx(active, rel=0.05)


def test_windows_of_attention_are_counted():
    run = NAMED["olmo3-7b"]
    assert run.config is not None
    without = flops_per_token({**run.config, "sliding_window": None}, run.seq_len)
    assert run.per_token.attention_causal < 0.85 * without.attention_causal


def test_utilisation_is_work_over_what_the_device_could_do():
    run = NAMED["deepseek-v3-steady"]
    assert run.mfu == pytest.approx(0.39, abs=0.01)  # arXiv:2505.09343 table 4 has 38.94%
    hours = NAMED["llama2-7b"]
    by_hand = hours.per_token.model * 2e12 / (184320 * 3600 * 312e12)
    assert math.isclose(hours.mfu, by_hand)
    assert peak(hours.device) == 312e12
