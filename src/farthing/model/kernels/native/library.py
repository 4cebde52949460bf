"""Compiled steps on disk and in this process.

A step is compiled once for an instruction set, a processor and a version of everything that shapes its code, and kept
in the cache folder as an object file behind its own digest. A file that is damaged, of another user or from another
version is not read. Loading one takes milliseconds and needs llvmlite alone.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from farthing.base import processor
from farthing.base.files import cache_folder, locked, new_file
from farthing.base.limits import Unwritable
from farthing.base.terminal import say
from farthing.base.waiting import Waiting

FUSED = frozenset({"avx2", "avx_ne_convert", "avx512", "avx512_bf16", "amx", "neon", "bf16"})
# What LLVM calls a lesser x86 processor than this one; ours is asked for by its own name.
_LEVELS = {
    "avx2": "x86-64-v3",
    "avx_ne_convert": "x86-64-v3",
    "avx512": "x86-64-v4",
    "avx512_bf16": "x86-64-v4",
}
_MORE = {"avx_ne_convert": "+avxvnni", "avx512_bf16": "+avx512vnni,+avx512bf16"}
_HOST = (
    "__init__",
    "library",
    "session",
    "crew",
    "operations",
    "packing",
    "trial",
)  # nothing of these is compiled
_BUILD = "farthing.model.kernels.native.build"

Step = Callable[[int, int], int]


class NoKernels(Exception):
    """Why this machine has no compiled kernels."""


def lacks() -> str:
    """Why nothing can be compiled for this machine; "" if it can."""
    if processor.isa() not in FUSED:
        return f"{processor.isa()} has no fused multiply-add"
    for name in ("numba", "llvmlite"):
        if importlib.util.find_spec(name) is None:
            return f"{name} is not installed; pip install {name}"
    return ""


@functools.cache
def step(kinds: tuple[str, ...], isa: str | None = None) -> Step:
    """Return `run(words, thread)` of `step.stepper` for weights of these kinds; compiles it if it is not kept yet, and
    says so.

    Args:
        isa: an instruction set of `FUSED` that this machine has; the one in use by default.

    Raises:
        NoKernels: if this machine has none, or compiling fails.
    """
    if why := lacks():
        raise NoKernels(why)
    isa = isa or processor.isa()
    cpu, features = _processor(isa)
    name = f"{kinds[0]}-{isa}-{_key(kinds, isa, cpu, features)}.o"
    code = None
    try:
        folder = cache_folder() / "kernels"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / name
        code = _kept(path)
        if code is None:
            waiting = Waiting(f"waiting for another process to compile {kinds[0]} kernels", _say, first=1.0)
            with waiting, locked(folder / f"{name}.lock"):
                code = _kept(path)  # another process may have compiled it meanwhile
                if code is None:
                    code = _compile(kinds, isa, cpu, features)
                    _keep(path, code)
    except (OSError, Unwritable):  # a cache that cannot be written keeps nothing
        code = code or _compile(kinds, isa, cpu, features)
    return _loaded(code)


def _processor(isa: str) -> tuple[str, str]:
    """LLVM's name of the processor to compile for, and its features."""
    import llvmlite.binding as llvm

    if isa == processor.levels()[-1]:
        return llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()
    return _LEVELS[isa], _MORE.get(isa, "")


def _key(kinds: tuple[str, ...], isa: str, cpu: str, features: str) -> str:
    """A digest of everything that the code depends on."""
    digest = hashlib.sha256()
    for part in (*kinds, isa, cpu, features, platform.system(), platform.machine(), version("numba")):
        digest.update(part.encode() + b"\0")
    digest.update(version("llvmlite").encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        if source.stem not in _HOST:
            digest.update(source.read_bytes())
    return digest.hexdigest()[:24]


def _kept(path: Path) -> bytes | None:
    """The code in a file; None if it is absent, damaged, or could have been written by another user."""
    try:
        found = path.stat()
        if hasattr(os, "getuid") and (found.st_uid != os.getuid() or found.st_mode & 0o022):
            return None
        digest, _, code = path.read_bytes().partition(b"\n")
    except OSError:
        return None
    return code if hashlib.sha256(code).hexdigest().encode() == digest else None


def _keep(path: Path, code: bytes) -> None:
    with new_file(path) as temporary:
        temporary.chmod(0o600)
        temporary.write_bytes(hashlib.sha256(code).hexdigest().encode() + b"\n" + code)


def _compile(kinds: tuple[str, ...], isa: str, cpu: str, features: str) -> bytes:
    """Compile in a process of its own, saying so.

    Raises:
        NoKernels: if that fails.
    """
    try:
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "step.o"
            command = [sys.executable, "-P", "-m", _BUILD, ",".join(kinds), isa, cpu, features, str(target)]
            with Waiting(f"compiling {kinds[0]} kernels for {isa}, once", _say, first=0.5):
                done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                last = (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1]
                raise NoKernels(f"compiling failed: {last[:160]}")
            return target.read_bytes()
    except OSError as error:  # no place for temporary files, no memory for another process
        raise NoKernels(f"compiling failed: {error}") from error


def _say(text: str) -> None:
    say(text, sys.stderr)


_engines: list[Any] = []  # code lives as long as its engine


def _loaded(code: bytes) -> Step:
    import llvmlite.binding as llvm

    symbol, _, binary = code.partition(b"\n")
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_triple(llvm.get_process_triple()).create_target_machine(jit=True)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
    engine.add_object_file(llvm.ObjectFileRef.from_data(binary))
    engine.finalize_object()
    address = engine.get_function_address(symbol.decode())
    if not address:
        raise NoKernels("the compiled code has no entry")
    _engines.append(engine)
    # numba's convention: a place for the result, a place for an exception, the arguments; returns a status
    function = ctypes.CFUNCTYPE(
        ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64
    )(address)

    def run(words: int, thread: int) -> int:
        result, exception = ctypes.c_int64(), ctypes.c_void_p()
        status = function(ctypes.addressof(result), ctypes.addressof(exception), words, thread)
        assert status == 0
        return result.value

    return run
