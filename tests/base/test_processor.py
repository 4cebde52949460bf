"""The processor's instructions, read from what Linux and macOS say of several machines, and made lesser."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from farthing.base import processor
from farthing.base.errors import UserError

AVX2 = frozenset(["sse4_1", "sse4_2", "avx", "fma", "avx2", "f16c"])
SKYLAKE = AVX2 | frozenset(["avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512cd"])
ZEN4 = SKYLAKE | {"avx512_bf16", "avx512_vnni"}
SAPPHIRE_RAPIDS = ZEN4 | {"amx_tile", "amx_bf16", "amx_int8"}
MACHINES = {
    "no-avx2": ("x86_64", frozenset({"sse4_2"}), ("sse4",)),
    "avx2": ("x86_64", AVX2, ("sse4", "avx2")),
    "arrow-lake": ("x86_64", AVX2 | {"avx_ne_convert"}, ("sse4", "avx2", "avx_ne_convert")),
    "skylake": ("x86_64", SKYLAKE, ("sse4", "avx2", "avx512")),
    "zen4": ("AMD64", ZEN4, ("sse4", "avx2", "avx512", "avx512_bf16")),
    "amx": ("x86_64", SAPPHIRE_RAPIDS, ("sse4", "avx2", "avx512", "avx512_bf16", "amx")),
    "raspberry": ("aarch64", frozenset({"asimd"}), ("neon",)),
    "graviton3": ("aarch64", frozenset({"asimd", "bf16"}), ("neon", "bf16")),
    "m2": ("arm64", frozenset({"bf16"}), ("neon", "bf16")),
    "riscv": ("riscv64", frozenset(), ("generic",)),
}


@pytest.fixture(autouse=True)
def afresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("FARTHING_ISA", raising=False)
    processor.isa.cache_clear()
    yield
    processor.isa.cache_clear()


@pytest.mark.parametrize("name", MACHINES)
def test_what_a_machine_has(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    machine, features, expected = MACHINES[name]
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(processor, "features", lambda: features)
    assert processor.levels() == expected
    assert processor.isa() == expected[-1]
    assert (processor.isa() in processor.BFLOAT16) == bool(
        features & {"avx_ne_convert", "avx512_bf16", "bf16"}
    )


def test_a_lesser_set_is_used_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "levels", lambda: ("sse4", "avx2", "avx512"))
    monkeypatch.setattr(processor, "_too_late", False)
    monkeypatch.setenv("FARTHING_ISA", "avx2")
    assert processor.isa() == "avx2"


@pytest.mark.parametrize("level", [*processor.X86, *processor.ARM, "generic"])
def test_every_set_has_its_limits(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "levels", lambda: (level, "best"))
    monkeypatch.setenv("FARTHING_ISA", level)
    monkeypatch.setattr(processor, "_too_late", False)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    processor.limit_libraries()
    assert processor._LIMITS[level].items() <= os.environ.items()


def test_the_best_set_may_be_named_at_any_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "levels", lambda: ("sse4", "avx2"))
    monkeypatch.setattr(processor, "_too_late", False)
    monkeypatch.setenv("FARTHING_ISA", "avx2")
    processor.limit_libraries()  # torch has long been loaded
    assert processor.isa() == "avx2"


@pytest.mark.parametrize(
    ("asked", "why"), [("amx", "this processor lacks it"), ("avx3", "unknown instruction set")]
)
def test_a_set_that_is_not_there_is_refused(asked: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "levels", lambda: ("sse4", "avx2"))
    monkeypatch.setenv("FARTHING_ISA", asked)
    with pytest.raises(UserError, match=f"FARTHING_ISA={asked}: {why}; use one of sse4, avx2"):
        processor.isa()


def test_macos_is_read_through_sysctl(monkeypatch: pytest.MonkeyPatch) -> None:
    said = "hw.optional.arm.FEAT_BF16: 1\nhw.optional.arm.FEAT_SME: 0\nmachdep.cpu.features: FPU SSE4.2 FMA\n"
    done = subprocess.CompletedProcess([], 0, said + "machdep.cpu.leaf7_features: AVX2 BMI1\n", "")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: (_ for _ in ()).throw(FileNotFoundError()))
    assert processor.features() == {"bf16", "fpu", "sse4.2", "fma", "avx2", "bmi1"}
    monkeypatch.setattr(sys, "platform", "freebsd")
    assert processor.features() == frozenset()


def run_python(code: str, **environment: str) -> str:
    clean = {k: v for k, v in os.environ.items() if k not in ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA")}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**clean, **environment}, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.mark.skipif("avx2" not in processor.levels(), reason="needs a processor with AVX2")
def test_torch_is_told_before_it_loads() -> None:
    code = "import farthing, torch; print(torch.backends.cpu.get_cpu_capability())"
    assert run_python(code, FARTHING_ISA="avx2") == "AVX2"
    code += "; print(torch.ops.mkldnn._is_mkldnn_bf16_supported())"
    assert run_python(code, FARTHING_ISA="sse4").split() in (["DEFAULT", "False"], ["NO", "AVX", "False"])


@pytest.mark.skipif("avx2" not in processor.levels(), reason="needs a processor with AVX2")
def test_an_import_of_torch_that_came_first_is_said() -> None:
    code = """
import torch, farthing
from farthing.base import processor
try:
    processor.isa()
except farthing.UserError as error:
    print(error)
"""
    assert run_python(code, FARTHING_ISA="sse4") == (
        "FARTHING_ISA=sse4 has no effect once torch is loaded; import farthing before torch"
    )
