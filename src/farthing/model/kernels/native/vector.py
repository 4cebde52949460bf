"""Vector code for any instruction set: a small language over LLVM's vectors, made into functions that numba can call.

Every vector has `LANES` float32 lanes: one register with AVX-512, two with AVX2, four with NEON. LLVM splits it. Loops
run over addresses and whole vectors only, so buffers are padded to a multiple of `LANES` elements; what the padding
holds must not matter to the result, and zeros never do.

`elementwise` and `reduction` turn an expression over `Vector` into a numba intrinsic. Addresses are int64, lengths are
counts of elements.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from inspect import Parameter, Signature
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from farthing.model.kernels.native.sizes import LANES

F16, F32, F64 = ir.HalfType(), ir.FloatType(), ir.DoubleType()
I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))


class _BFloat(ir.Type):
    """LLVM's bfloat, which llvmlite does not name: for the instructions that take it, and only by bitcast."""

    def __str__(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


BF16 = _BFloat()

# log2(e), and ln 2 in two parts so that n * ln 2 is exact for the |n| that occur
_LOG2E, _LN2_HIGH, _LN2_LOW = 1.44269504088896341, 0.693359375, -2.12194440e-4
# Taylor's coefficients of (e^r - 1 - r) / r^2, the last ones adjusted to |r| <= ln 2 / 2
_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
_ROUND = 12582912.0  # 1.5 * 2^23: adding it rounds a small float32 to a whole number


def constant(element: ir.Type, value: float, lanes: int = LANES) -> ir.Constant:
    """A vector of one value."""
    return ir.Constant(ir.VectorType(element, lanes), [ir.Constant(element, value)] * lanes)


def integer(value: int) -> ir.Constant:
    """An int64, as addresses and lengths are."""
    return ir.Constant(I64, value)


def pointer(builder: ir.IRBuilder, address: ir.Value, element: ir.Type) -> ir.Value:
    return builder.inttoptr(address, element.as_pointer())


def load(
    builder: ir.IRBuilder, address: ir.Value, element: ir.Type, lanes: int = LANES, align: int = 0
) -> ir.Value:
    """Load a vector from an address of any alignment that suits its elements."""
    vector = ir.VectorType(element, lanes)
    return builder.load(pointer(builder, address, vector), align=align or _size(element))


def store(builder: ir.IRBuilder, value: ir.Value, address: ir.Value) -> None:
    """Store a vector at an address of any alignment that suits its elements."""
    builder.store(value, pointer(builder, address, value.type), align=_size(value.type.element))


def _size(element: ir.Type) -> int:
    return {F16: 2, F32: 4, F64: 8}.get(element) or element.width // 8


def offset(builder: ir.IRBuilder, address: ir.Value, *parts: ir.Value | int) -> ir.Value:
    """An address and some bytes."""
    for part in parts:
        if not isinstance(part, int):
            address = builder.add(address, part)
        elif part:
            address = builder.add(address, integer(part))
    return address


def shuffle(builder: ir.IRBuilder, vector: ir.Value, order: Sequence[int]) -> ir.Value:
    """The vector of these lanes."""
    mask = ir.Constant(ir.VectorType(I32, len(order)), [ir.Constant(I32, i) for i in order])
    return builder.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), mask)


def splat(builder: ir.IRBuilder, scalar: ir.Value, lanes: int = LANES) -> ir.Value:
    """The vector that holds a scalar in every lane."""
    empty = ir.Constant(ir.VectorType(scalar.type, lanes), ir.Undefined)
    one = builder.insert_element(empty, scalar, ir.Constant(I32, 0))
    return shuffle(builder, one, [0] * lanes)


def call(builder: ir.IRBuilder, name: str, result: ir.Type, *arguments: ir.Value) -> ir.Value:
    """Call one of LLVM's intrinsics or a function of the C library."""
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


def prefetch(builder: ir.IRBuilder, address: ir.Value) -> None:
    """Start to load a line of the cache that is read soon; any address is safe."""
    byte = builder.inttoptr(address, I8.as_pointer())
    flags = [ir.Constant(I32, value) for value in (0, 3, 1)]  # to read, into every cache, as data
    call(builder, "llvm.prefetch.p0", ir.VoidType(), byte, *flags)


def fma(builder: ir.IRBuilder, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
    """x * y + z, rounded once."""
    return call(builder, f"llvm.fma.v{x.type.count}f32", x.type, x, y, z)


class Vector:
    """A float32 vector with arithmetic; the other operand may be a number."""

    def __init__(self, builder: ir.IRBuilder, value: ir.Value) -> None:
        self.builder, self.value = builder, value

    def _of(self, other: Vector | float) -> ir.Value:
        return other.value if isinstance(other, Vector) else constant(F32, other, self.value.type.count)

    def _new(self, value: ir.Value) -> Vector:
        return Vector(self.builder, value)

    def __add__(self, other: Vector | float) -> Vector:
        return self._new(self.builder.fadd(self.value, self._of(other)))

    def __sub__(self, other: Vector | float) -> Vector:
        return self._new(self.builder.fsub(self.value, self._of(other)))

    def __mul__(self, other: Vector | float) -> Vector:
        return self._new(self.builder.fmul(self.value, self._of(other)))

    def __truediv__(self, other: Vector | float) -> Vector:
        return self._new(self.builder.fdiv(self.value, self._of(other)))

    def __neg__(self) -> Vector:
        return self._new(self.builder.fsub(self._of(0.0), self.value))

    def times_plus(self, factor: Vector | float, addend: Vector | float) -> Vector:
        """self * factor + addend, rounded once."""
        return self._new(fma(self.builder, self.value, self._of(factor), self._of(addend)))

    def larger(self, other: Vector | float) -> Vector:
        """The larger of both, lane by lane; NaN stays, if it is the first of them."""
        other_value = self._of(other)
        which = self.builder.fcmp_ordered("<", self.value, other_value)
        return self._new(self.builder.select(which, other_value, self.value))

    def absolute(self) -> Vector:
        return self._new(
            call(self.builder, f"llvm.fabs.v{self.value.type.count}f32", self.value.type, self.value)
        )

    def root(self) -> Vector:
        return self._new(
            call(self.builder, f"llvm.sqrt.v{self.value.type.count}f32", self.value.type, self.value)
        )

    def exp(self) -> Vector:
        """e^x within 2 ulp: 2^n times a polynomial in x - n ln 2 (Cody and Waite 1980); flushed to [e^-87.3, e^88]."""
        lanes, b = self.value.type.count, self.builder
        x = self.larger(-87.3)
        x = -((-x).larger(-88.0))
        shifted = x.times_plus(_LOG2E, _ROUND)
        whole = shifted - _ROUND
        n = b.sub(b.bitcast(shifted.value, ir.VectorType(I32, lanes)), constant(I32, 0x4B400000, lanes))
        r = whole.times_plus(-_LN2_HIGH, x)
        r = whole.times_plus(-_LN2_LOW, r)
        polynomial = self._new(constant(F32, _EXP[0], lanes))
        for coefficient in _EXP[1:]:
            polynomial = polynomial.times_plus(r, coefficient)
        fraction = polynomial.times_plus(r * r, r + 1.0)
        power = b.shl(b.add(n, constant(I32, 127, lanes)), constant(I32, 23, lanes))
        return fraction * self._new(b.bitcast(power, ir.VectorType(F32, lanes)))

    def sigmoid(self) -> Vector:
        return self._new(self._of(1.0)) / ((-self).exp() + 1.0)

    def tanh(self) -> Vector:
        return (self * 2.0).sigmoid() * 2.0 - 1.0

    def silu(self) -> Vector:
        return self * self.sigmoid()

    def gelu(self) -> Vector:
        """GELU's tanh approximation (arXiv:1606.08415 section 2): x sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3))."""
        return self * ((self * self * 0.044715 + 1.0) * self * 1.5957691216057308).sigmoid()

    def sum(self) -> ir.Value:
        """The sum of the lanes, halving them."""
        return self._folded(self.builder.fadd)

    def max(self) -> ir.Value:
        """The largest lane."""
        return self._folded(lambda a, b: self._new(a).larger(self._new(b)).value)

    def _folded(self, combine: Callable[[ir.Value, ir.Value], ir.Value]) -> ir.Value:
        value, lanes = self.value, self.value.type.count
        while lanes > 1:
            lanes //= 2
            low = shuffle(self.builder, value, range(lanes))
            high = shuffle(self.builder, value, range(lanes, 2 * lanes))
            value = combine(low, high)
        return self.builder.extract_element(value, ir.Constant(I32, 0))


def widened(builder: ir.IRBuilder, stored: ir.Value) -> ir.Value:
    """float32 lanes of a vector that is stored as float32, float16, or bfloat16 (int16 here: LLVM's own bfloat would be
    emulated where the processor has no instructions for it)."""
    lanes = stored.type.count
    if stored.type.element == F32:
        return stored
    if stored.type.element == F16:
        return builder.fpext(stored, ir.VectorType(F32, lanes))
    bits = builder.shl(builder.zext(stored, ir.VectorType(I32, lanes)), constant(I32, 16, lanes))
    return builder.bitcast(bits, ir.VectorType(F32, lanes))


def to_bfloat16(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """The nearest bfloat16 of each lane, ties to even, as int16."""
    lanes = value.type.count
    bits = builder.bitcast(value, ir.VectorType(I32, lanes))
    odd = builder.and_(builder.lshr(bits, constant(I32, 16, lanes)), constant(I32, 1, lanes))
    rounded = builder.add(builder.add(bits, odd), constant(I32, 0x7FFF, lanes))
    return builder.trunc(builder.lshr(rounded, constant(I32, 16, lanes)), ir.VectorType(I16, lanes))


STORED = {"float32": F32, "bfloat16": I16, "float16": F16}
Loop = Callable[[ir.IRBuilder, ir.Value, Callable[[ir.Value], None]], None]


def vectors(builder: ir.IRBuilder, count: ir.Value, body: Callable[[ir.Value], None]) -> None:
    """Run `body` with the index of the first element of each vector of `count` elements, rounded up."""
    with cgutils.for_range_slice(builder, integer(0), count, integer(LANES), I64) as (index, _):
        body(index)


def _at(builder: ir.IRBuilder, address: ir.Value, index: ir.Value, element: ir.Type) -> ir.Value:
    return builder.add(address, builder.mul(index, integer(_size(element))))


def elementwise(
    inputs: int, scalars: int = 0, reads: str = "float32", writes: str = "float32"
) -> Callable[[Callable[..., Vector]], Any]:
    """Make `f(out, in..., scalar..., count)` of an expression over vectors: out[i] = expression(in[i]..., scalar...).

    `out` may be one of the inputs. Scalars are float32.
    """

    def make(expression: Callable[..., Vector]) -> Any:
        def generated(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
            out, *rest, count = arguments
            fixed = [Vector(builder, splat(builder, s)) for s in rest[inputs:]]

            def body(index: ir.Value) -> None:
                element = STORED[reads]
                given = [
                    Vector(builder, widened(builder, load(builder, _at(builder, a, index, element), element)))
                    for a in rest[:inputs]
                ]
                value = expression(*given, *fixed).value
                if writes == "bfloat16":
                    value = to_bfloat16(builder, value)
                store(builder, value, _at(builder, out, index, STORED[writes]))

            vectors(builder, count, body)
            return context.get_dummy_value()

        kinds = [types.int64] * (1 + inputs) + [types.float32] * scalars + [types.int64]
        return primitive(expression.__name__, types.void, kinds, generated)

    return make


def reduction(
    inputs: int, scalars: int = 0, by: str = "sum", keeps: bool = False
) -> Callable[[Callable[..., Vector]], Any]:
    """Make `f(in..., scalar..., count)` of an expression over vectors: the sum or the largest of its values, float32.

    With `keeps`, the values replace the first input.
    """

    def make(expression: Callable[..., Vector]) -> Any:
        def generated(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
            *rest, count = arguments
            fixed = [Vector(builder, splat(builder, s)) for s in rest[inputs:]]
            total = cgutils.alloca_once(builder, ir.VectorType(F32, LANES))
            builder.store(constant(F32, 0.0 if by == "sum" else -3.4e38), total)

            def body(index: ir.Value) -> None:
                places = [_at(builder, address, index, F32) for address in rest[:inputs]]
                value = expression(*(Vector(builder, load(builder, place, F32)) for place in places), *fixed)
                if keeps:
                    store(builder, value.value, places[0])
                before = Vector(builder, builder.load(total))
                after = before + value if by == "sum" else before.larger(value)
                builder.store(after.value, total)

            vectors(builder, count, body)
            result = Vector(builder, builder.load(total))
            return result.sum() if by == "sum" else result.max()

        kinds = [types.int64] * inputs + [types.float32] * scalars + [types.int64]
        return primitive(expression.__name__, types.float32, kinds, generated)

    return make


def primitive(name: str, result: Any, kinds: Sequence[Any], generated: Any) -> Any:
    """A numba intrinsic with positional arguments of these types, whose code `generated(context, builder, signature,
    arguments)` writes."""

    def typed(typing_context: Any, *arguments: Any) -> Any:
        return result(*kinds), generated

    places = ("typing_context", *(f"argument{number}" for number in range(len(kinds))))
    typed.__name__ = name
    # numba reads the number of arguments here
    typed.__signature__ = Signature([Parameter(p, Parameter.POSITIONAL_ONLY) for p in places])  # type: ignore[attr-defined]
    return intrinsic(typed)
