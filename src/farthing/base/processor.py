"""The processor's instruction sets, and those that this process may use.

Asks the system, not torch. `FARTHING_ISA` names a lesser set than the machine has; then everything here answers as on
such a machine, and torch, oneDNN and MKL are limited before they load.
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
BFLOAT16 = frozenset({"avx_ne_convert", "avx512_bf16", "amx", "bf16"})  # sets with products of bfloat16

_NEEDED = {
    "avx2": {"avx2", "fma"},
    "avx_ne_convert": {"avx_ne_convert"},
    "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq"},
    "avx512_bf16": {"avx512_bf16"},
    "amx": {"amx_tile", "amx_bf16"},
    "bf16": {"bf16"},
}
# What torch, oneDNN and MKL read when they load; where MKL has no name for a set, oneDNN's limit has to do.
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
    """The processor's features as Linux or macOS names them, lower case; empty where neither tells."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return _apple_features()
    match = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    return frozenset(match[1].lower().split()) if match else frozenset()


def _apple_features() -> frozenset[str]:
    """sysctl's names: hw.optional.arm.FEAT_BF16 is `bf16`, machdep.cpu.leaf7_features holds AVX2 on an Intel Mac."""
    said = sysctl("hw.optional.arm", "machdep.cpu.features", "machdep.cpu.leaf7_features")
    found = re.findall(r"FEAT_(\w+): 1$", said, re.MULTILINE)
    for words in re.findall(r"features: (.+)$", said, re.MULTILINE):
        found += words.split()
    return frozenset(name.lower() for name in found)


def sysctl(*arguments: str) -> str:
    """A value of macOS's sysctl; empty elsewhere, or if it does not answer."""
    if sys.platform != "darwin":
        return ""
    command = ["sysctl", *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def levels() -> tuple[str, ...]:
    """The instruction sets of this machine, the least first."""
    machine, have = platform.machine().lower(), features()
    known = {"arm64": ARM, "aarch64": ARM, "x86_64": X86, "amd64": X86}.get(machine, ("generic",))
    return tuple(level for level in known if _NEEDED.get(level, set()) <= have)


@functools.cache
def isa() -> str:
    """The instruction set to use: the machine's best, or the one that FARTHING_ISA names.

    Raises:
        UserError: if FARTHING_ISA names an unknown set or one that the machine lacks, or was set after torch had
        loaded.
    """
    have, asked = levels(), os.environ.get("FARTHING_ISA", "")
    if not asked:
        return have[-1]
    if asked not in have:
        why = "this processor lacks it" if asked in X86 + ARM else "no such instruction set"
        raise UserError(f"FARTHING_ISA={asked}: {why}; it has {', '.join(have)}")
    if _too_late:
        raise UserError(f"FARTHING_ISA={asked} came too late: import farthing before torch")
    return asked


_too_late = False


def limit_libraries() -> None:
    """Limit torch, oneDNN and MKL to FARTHING_ISA; call it before torch loads. `isa` refuses an invalid value."""
    global _too_late
    asked = os.environ.get("FARTHING_ISA", "")
    if asked not in levels()[:-1]:  # nothing is asked for, or nothing less than there is
        return
    missing = {key: value for key, value in _LIMITS[asked].items() if os.environ.get(key) != value}
    _too_late = bool(missing) and "torch" in sys.modules
    os.environ.update(missing)
