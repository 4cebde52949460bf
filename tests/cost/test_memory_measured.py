"""Predicted against measured peak memory, on five models and four kinds of training, each in a process of its own."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from farthing.cost.memory import CPU_IMPORTS, memory

HERE = Path(__file__).parent
MIB = 2**20
TEXT = {"rows": 4, "length": 512, "micro_tokens": 2048}
# four questions of 16 tokens, eight answers of 48 to each
ANSWERS = {"rows": 4, "length": 64, "new_tokens": 48, "group": 8, "micro_tokens": 4 * (16 + 8 * 48)}


def _configs():
    spec = importlib.util.spec_from_file_location("configs", HERE / "configs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.CONFIGS


CONFIGS = _configs()


def _measure(kind, name, precision, device, optimizer):
    """What the run took, and what was predicted, in bytes."""
    shape = ANSWERS if kind == "grpo" else TEXT
    dtype = {"bf16": "bfloat16", "fp32": "float32"}[precision]
    case = {"kind": kind, "config": CONFIGS[name], "dtype": dtype, "device": device, "rank": 16} | shape
    done = subprocess.run(
        [sys.executable, HERE / "peak.py", json.dumps(case | {"optimizer": optimizer})],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    predicted = memory(
        CONFIGS[name], kind=kind, micro_tokens=shape["micro_tokens"], seq_len=shape["length"],
        precision=precision, optimizer=optimizer, code=f"farthing-{'cpu' if device == 'cpu' else 'gpu'}",
        lora_rank=16 if kind == "lora" else 0, cache_tokens=ANSWERS["rows"] * ANSWERS["group"] * 64,
    ).total  # fmt: skip
    if device == "cpu":  # another machine's interpreter and libraries may be larger or smaller
        predicted += found["base"] - CPU_IMPORTS
    return found["peak"], predicted


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peaks are read from Linux's /proc")
@pytest.mark.parametrize("kind", ["pretrain", "sft", "lora", "grpo"])
@pytest.mark.parametrize("name", CONFIGS)
def test_resident_memory_on_a_cpu(name, kind):
    peak, predicted = _measure(kind, name, "bf16", "cpu", "adamw")
    print(f"{name} {kind}: {peak / MIB:.0f} MiB measured, {predicted / MIB:.0f} predicted")
    assert predicted == pytest.approx(peak, rel=0.1)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peaks are read from Linux's /proc")
@pytest.mark.parametrize(("precision", "optimizer"), [("fp32", "adamw"), ("bf16", "muon"), ("fp32", "muon")])
def test_resident_memory_in_float32_and_with_muon(precision, optimizer):
    peak, predicted = _measure("pretrain", "llama-19m", precision, "cpu", optimizer)
    print(f"{precision} {optimizer}: {peak / MIB:.0f} MiB measured, {predicted / MIB:.0f} predicted")
    assert predicted == pytest.approx(peak, rel=0.1)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["pretrain", "sft", "lora", "grpo"])
@pytest.mark.parametrize("name", CONFIGS)
def test_allocated_memory_on_a_gpu(name, kind):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU here")
    peak, predicted = _measure(kind, name, "bf16", "cuda", "adamw")
    print(f"{name} {kind}: {peak / MIB:.0f} MiB measured, {predicted / MIB:.0f} predicted")
    assert predicted == pytest.approx(peak, rel=0.1)
