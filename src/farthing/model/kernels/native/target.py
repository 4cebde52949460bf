"""What the generator has to know about an instruction set: how many rows fit its registers, and its integer product."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llvmlite import ir

from farthing.model.kernels.native.sizes import DOTTED, LANES
from farthing.model.kernels.native.vector import I32, call, shuffle

WIDE = ("avx512", "avx512_bf16", "amx")  # 32 registers of 16 float32 lanes
NARROW = ("avx2", "avx_ne_convert")  # 16 registers of 8


@dataclass(frozen=True)
class Target:
    """An instruction set of `library.FUSED`: those without a fused multiply-add have no kernels."""

    isa: str

    def rows(self, kind: str) -> tuple[int, ...]:
        """The numbers of rows to generate products for, ascending. The largest keeps its sums in registers."""
        if self.isa in WIDE:
            return (1, 2, 3, 4, 6, 8, 12) if kind.startswith("int") else (1, 2, 3, 4, 6, 8)
        return (1, 2, 3) if kind.startswith("int") else (1, 2, 3, 4, 6)

    def blocks(self, kind: str) -> int:
        """Blocks of 16 outputs that share one load of x: two where registers suffice."""
        return 2 if self.isa in WIDE and not kind.startswith("int") else 1

    @property
    def dots(self) -> bool:
        """Whether pairs of bfloat16 are multiplied and added in one instruction (`vdpbf16ps`)."""
        return self.isa in DOTTED

    def pairwise(self, builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
        """a[2i] b[2i] + a[2i + 1] b[2i + 1] of int16 lanes, int32. LLVM joins it with an addition that follows
        (`vpdpwssd`)."""
        wide = ir.VectorType(I32, LANES)
        if self.isa in WIDE:
            return call(builder, "llvm.x86.avx512.pmaddw.d.512", wide, a, b)
        if self.isa in NARROW:
            half = ir.VectorType(I32, LANES // 2)
            parts = [
                call(
                    builder,
                    "llvm.x86.avx2.pmadd.wd",
                    half,
                    shuffle(builder, a, lanes),
                    shuffle(builder, b, lanes),
                )
                for lanes in (range(LANES), range(LANES, 2 * LANES))
            ]
            return _joined(builder, *parts)

        def every_other(vector: ir.Value, first: int) -> ir.Value:
            return builder.sext(shuffle(builder, vector, range(first, 2 * LANES, 2)), wide)

        even = builder.mul(every_other(a, 0), every_other(b, 0))
        return builder.add(even, builder.mul(every_other(a, 1), every_other(b, 1)))


def _joined(builder: ir.IRBuilder, low: ir.Value, high: ir.Value) -> ir.Value:
    lanes: Sequence[int] = range(low.type.count + high.type.count)
    mask = ir.Constant(ir.VectorType(I32, len(lanes)), [ir.Constant(I32, i) for i in lanes])
    return builder.shuffle_vector(low, high, mask)
