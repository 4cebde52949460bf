"""The processor's instruction sets, and those this process may use.

Reads system information, so it works without torch. `FARTHING_ISA` limits the process to a smaller set than the machine
has: everything here then answers as on such a machine, and torch, oneDNN and MKL are limited before they load.
"""

from __future__ import annotations

import functools
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

from farthing.base.errors import UserError

X86 = ("sse4", "avx2", "avx_ne_convert", "avx512", "avx512_bf16", "amx")
ARM = ("neon", "bf16")
BFLOAT16 = frozenset({"avx_ne_convert", "avx512_bf16", "amx", "bf16"})  # sets with bfloat16 products

_NEEDED = {
    "avx2": {"avx2", "fma"},
    "avx_ne_convert": {"avx_ne_convert"},
    "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq"},
    "avx512_bf16": {"avx512_bf16"},
    "amx": {"amx_tile", "amx_bf16"},
    "bf16": {"bf16"},
}
# Variables that torch, oneDNN and MKL read when they load; if MKL has no name for a set, only oneDNN's limit applies.
_LIMITS = {
    "sse4": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "avx_ne_convert": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2_VNNI_2"},
    "avx512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "MKL_ENABLE_INSTRUCTIONS": "AVX512"},
    "avx512_bf16": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
    "amx": {},
    "neon": {"ATEN_CPU_CAPABILITY": "default"},
    "bf16": {},
    "generic": {},
}  # fmt: skip


def features() -> frozenset[str]:
    """Return the processor's features by their Linux or macOS names, in lower case; empty if unknown."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return _apple_features()
    match = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    return frozenset(match[1].lower().split()) if match else frozenset()


def _apple_features() -> frozenset[str]:
    """Features by sysctl: hw.optional.arm.FEAT_BF16 is `bf16`; machdep.cpu.leaf7_features has AVX2 on an Intel Mac."""
    output = sysctl("hw.optional.arm", "machdep.cpu.features", "machdep.cpu.leaf7_features")
    names = re.findall(r"FEAT_(\w+): 1$", output, re.MULTILINE)
    for words in re.findall(r"features: (.+)$", output, re.MULTILINE):
        names += words.split()
    return frozenset(name.lower() for name in names)


def sysctl(*arguments: str) -> str:
    """Return the output of macOS's sysctl; empty on other systems or on failure."""
    if sys.platform != "darwin":
        return ""
    command = ["sysctl", *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def levels() -> tuple[str, ...]:
    """Return this machine's instruction sets, smallest first."""
    machine, available = platform.machine().lower(), features()
    known = {"arm64": ARM, "aarch64": ARM, "x86_64": X86, "amd64": X86}.get(machine, ("generic",))
    return tuple(level for level in known if _NEEDED.get(level, set()) <= available)


@functools.cache
def isa() -> str:
    """Return the instruction set to use: the one named by FARTHING_ISA, else the machine's largest.

    Raises:
        UserError: if FARTHING_ISA names an unknown set or one the machine lacks, or took effect after torch had loaded.
    """
    available, requested = levels(), os.environ.get("FARTHING_ISA", "")
    if not requested:
        return available[-1]
    if requested not in available:
        why = "this processor lacks it" if requested in X86 + ARM else "unknown instruction set"
        raise UserError(f"FARTHING_ISA={requested}: {why}; use one of {', '.join(available)}")
    if _too_late:
        raise UserError(
            f"FARTHING_ISA={requested} has no effect once torch is loaded; import farthing before torch"
        )
    return requested


_too_late = False


def limit_libraries() -> None:
    """Limit torch, oneDNN and MKL to FARTHING_ISA; call before torch loads.

    Ignores an invalid value; `isa` rejects it.
    """
    global _too_late
    requested = os.environ.get("FARTHING_ISA", "")
    if requested not in levels()[:-1]:  # unset, or already the machine's largest set
        return
    missing = {key: value for key, value in _LIMITS[requested].items() if os.environ.get(key) != value}
    _too_late = bool(missing) and "torch" in sys.modules
    os.environ.update(missing)
