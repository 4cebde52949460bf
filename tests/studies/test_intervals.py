"""The study of intervals: its methods give the published numbers, and its coverage is what the documentation shows."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def study() -> ModuleType:
    spec = importlib.util.spec_from_file_location("intervals_study", ROOT / "studies" / "intervals.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["intervals_study"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("method", "low", "high"),
    [
        ("wald", -0.520, -0.052),
        ("bonett_price", -0.508, -0.013),
        ("newcombe", -0.507, -0.026),
        ("ours", -0.517, -0.026),
    ],
)
def test_the_methods_are_the_published_ones(study: ModuleType, method: str, low: float, high: float) -> None:
    # 1 changed up, 7 down, 1 and 12 alike: Fagerland, Lydersen and Laake, Statistics in Medicine 33 (2014), table IV
    assert getattr(study, method)((1, 7, 1, 12)) == pytest.approx((low, high), abs=6e-4)


def test_clopper_and_pearsons_interval_is_exact(study: ModuleType) -> None:
    assert study._clopper_pearson(0, 10) == pytest.approx((0.0, 1 - 0.025**0.1), abs=1e-9)
    assert study._clopper_pearson(3, 10) == pytest.approx((0.0667, 0.6525), abs=1e-4)
    assert study.conditional((0, 0, 5, 5)) == (0, 0)


def test_the_table_shown_is_the_one_it_prints(study: ModuleType) -> None:
    shown = (ROOT / "docs" / "evaluation.md").read_text()
    for row in study.paired_table(300, sizes=(20,)):
        if row["method"] in ("bootstrap", "Tango", "Newcombe 10"):
            [line] = [line for line in shown.splitlines() if line.startswith("| 20 | ") and "/" in line]
            cell = dict(zip(study.METHODS, line.split(" | ")[1:], strict=True))[row["method"]]
            _, mean = (float(part.strip(" |%")) / 100 for part in cell.split("/"))
            assert row["mean"] == pytest.approx(mean, abs=0.01)
            assert (row["lowest"] > 0.9) == (row["method"] != "bootstrap")


def test_samples_keep_the_promise_too(study: ModuleType) -> None:
    for row in study.sampled_table(200, sizes=(100,)):
        assert 0.88 < row["mean"] <= 1
        assert 0.9 < row["difference"] <= 1
