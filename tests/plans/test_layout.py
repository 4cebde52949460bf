import pytest

from farthing.cost import devices
from farthing.plans.layout import USABLE, best, candidates
from farthing.plans.published import published_runs

H100 = devices.find("h100")
NAMED = {run.name: run.config for run in published_runs()}
SMALL, LARGE, SPARSE = NAMED["llama3-8b"], NAMED["llama3.1-405b"], NAMED["deepseek-v3-pretrain"]


def test_every_layout_uses_all_devices_and_divides_the_model():
    found = list(candidates(SPARSE, H100, 256, 4096, 16e6))
    assert len(found) > 50
    for candidate in found:
        layout = candidate.layout
        assert layout.data * layout.tensor * layout.pipeline == 256
        assert layout.data % layout.expert == 0
        assert 256 % layout.expert == 0
        assert candidate.step >= candidate.compute
        assert candidate.memory_bytes > 0
        assert 0 <= candidate.bubble < 1
        assert candidate.limited_by in ("compute", "memory", "network")


def test_what_is_called_best_fits_and_is_hardly_slower_than_any_other_that_fits():
    fitting, least = best(SMALL, H100, 64, 8192, 4e6)
    room = H100.memory_bytes * USABLE
    assert fitting
    assert all(candidate.memory_bytes <= room for candidate in fitting)
    assert fitting[0].step <= 1.02 * min(candidate.step for candidate in fitting)
    assert least.memory_bytes <= min(candidate.memory_bytes for candidate in fitting)


def test_a_model_too_large_fits_nowhere_and_more_devices_help():
    fitting, least = best(LARGE, H100, 8, 8192, 16e6)
    assert not fitting
    assert least.memory_bytes > H100.memory_bytes
    fitting, _ = best(LARGE, H100, 4096, 8192, 16e6)
    assert fitting
    top = fitting[0].layout
    assert top.tensor * top.pipeline > 1 or top.zero == 3


def test_one_device_has_nothing_to_split_and_sends_nothing():
    for candidate in candidates(NAMED["pythia-160m"], H100, 1, 2048, 1e6):
        assert (candidate.layout.data, candidate.layout.tensor, candidate.layout.pipeline) == (1, 1, 1)
        assert candidate.network == 0
        assert candidate.bubble == 0


def test_pipelines_wait_less_the_more_micro_batches_there_are():
    def bubble(batch: float) -> float:
        return min(
            c.bubble
            for c in candidates(SMALL, H100, 64, 8192, batch)
            if c.layout.pipeline == 8 and c.layout.tensor == 1 and c.micro_batch == 1
        )

    assert bubble(32e6) < bubble(2e6)


@pytest.mark.parametrize("word", ["data", "recompute", "ZeRO"])
def test_a_layout_reads_as_words(word):
    assert word in str(best(SMALL, H100, 8, 8192, 4e6)[0][0])
