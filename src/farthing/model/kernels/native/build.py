"""Compiles a step to an object file: `python -m farthing.model.kernels.native.build KINDS ISA CPU FEATURES FILE`.

A process of its own, so that a program that only runs the kernels never loads numba, and Ctrl-C ends both. The file
holds the name of the entry, a line, and machine code; `library` keeps it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

UPDATE = ("optimizer",)  # instead of kinds of weights: an optimizer's step


def compiled(kinds: tuple[str, ...], isa: str, cpu: str, features: str) -> tuple[str, bytes]:
    """Return the entry's symbol and the object file of a step for weights of these kinds, or of `UPDATE`.

    numba only translates (NUMBA_OPT=0): it would optimize every function again for each that calls it. LLVM does so
    once, for the whole step and for the processor named, which need not be this one.
    """
    import llvmlite.binding as llvm
    from numba import int64

    from farthing.model.kernels.native.step import stepper, updater
    from farthing.model.kernels.native.target import Target

    run = updater() if kinds == UPDATE else stepper(kinds, Target(isa))
    run.compile((int64, int64))
    overload: Any = next(iter(run.overloads.values()))
    module = llvm.parse_assembly(str(overload.library._final_module))
    machine = llvm.Target.from_triple(llvm.get_process_triple()).create_target_machine(
        cpu=cpu, features=features, opt=3, reloc="pic", codemodel="default"
    )
    options = llvm.create_pipeline_tuning_options(speed_level=3)
    options.loop_vectorization = options.slp_vectorization = True
    builder = llvm.create_pass_builder(machine, options)
    builder.getModulePassManager().run(module, builder)
    return overload.fndesc.llvm_func_name, machine.emit_object(module)


if __name__ == "__main__":
    os.environ["NUMBA_OPT"] = "0"
    names, isa, cpu, features, target = sys.argv[1:]
    symbol, code = compiled(tuple(names.split(",")), isa, cpu, features)
    Path(target).write_bytes(symbol.encode() + b"\n" + code)
