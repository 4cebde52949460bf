"""Single values in memory, and what threads agree by: atomic words. Addresses are int64."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from farthing.model.kernels.native.vector import F32, F64, I16, I32, I64, call, pointer, primitive

_NUMBA = {F32: types.float32, F64: types.float64, I16: types.int16, I32: types.int32, I64: types.int64}


def _reader(element: ir.Type) -> Any:
    def generated(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        return builder.load(pointer(builder, arguments[0], element))

    return primitive(f"read_{element}", _NUMBA[element], [types.int64], generated)


def _writer(element: ir.Type) -> Any:
    def generated(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        builder.store(arguments[1], pointer(builder, arguments[0], element))
        return context.get_dummy_value()

    return primitive(f"write_{element}", types.void, [types.int64, _NUMBA[element]], generated)


read_f32, read_i16, read_i32, read_i64 = (_reader(element) for element in (F32, I16, I32, I64))
write_f32, write_i16, write_i32, write_i64 = (_writer(element) for element in (F32, I16, I32, I64))
read_f64, write_f64 = _reader(F64), _writer(F64)


def _fields(typing_context: Any, address: Any, count: Any) -> Any:
    """The int64 values at an address, as a tuple."""
    number = count.literal_value

    def generated(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        start = arguments[0]
        values = [
            builder.load(pointer(builder, builder.add(start, ir.Constant(I64, 8 * place)), I64))
            for place in range(number)
        ]
        return context.make_tuple(builder, signature.return_type, values)

    return types.UniTuple(types.int64, number)(address, count), generated


fields: Any = intrinsic(prefer_literal=True)(_fields)


def _cast(name: str, result: Any, given: Any, to: ir.Type) -> Any:
    def generated(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        return builder.bitcast(arguments[0], to)

    return primitive(name, result, [given], generated)


as_float = _cast("as_float", types.float64, types.int64, F64)  # of a float64's bits, as a field holds it


def _bfloat16(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
    bits = builder.bitcast(arguments[0], I32)
    odd = builder.and_(builder.lshr(bits, ir.Constant(I32, 16)), ir.Constant(I32, 1))
    rounded = builder.add(builder.add(bits, odd), ir.Constant(I32, 0x7FFF))
    return builder.trunc(builder.lshr(rounded, ir.Constant(I32, 16)), I16)


def _float32(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
    return builder.bitcast(builder.shl(builder.zext(arguments[0], I32), ir.Constant(I32, 16)), F32)


bfloat16_of = primitive("bfloat16_of", types.int16, [types.float32], _bfloat16)  # the nearest, ties to even
float32_of = primitive("float32_of", types.float32, [types.int16], _float32)


def _add(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
    return builder.atomic_rmw("add", pointer(builder, arguments[0], I64), arguments[1], "seq_cst")


def _look(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
    return builder.load_atomic(pointer(builder, arguments[0], I64), "acquire", 8)


def _publish(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
    builder.store_atomic(arguments[1], pointer(builder, arguments[0], I64), "release", 8)
    return context.get_dummy_value()


def _yield(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
    call(builder, "sched_yield", I32)
    return context.get_dummy_value()


atomic_add = primitive(
    "atomic_add", types.int64, [types.int64, types.int64], _add
)  # returns the value before
look = primitive("look", types.int64, [types.int64], _look)
publish = primitive("publish", types.void, [types.int64, types.int64], _publish)
give_way = primitive("give_way", types.void, [], _yield)
