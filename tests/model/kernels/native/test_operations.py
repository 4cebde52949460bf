"""Every operation of the compiled step against a few lines of torch."""

import inspect
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from farthing.engine.quantize import rounded
from farthing.engine.sampling import Row, Sampling, choose
from farthing.model import ModelConfig, Moe
from farthing.model.kernels.native import attend, draw, experts, matmul, pack, rowwise
from farthing.model.kernels.native.codes import FIELDS, Code
from farthing.model.kernels.native.operations import Operations, padded, spread
from farthing.model.kernels.native.packing import Packer
from farthing.model.kernels.native.sizes import ADD, GELU, SILU, SPAN, STORE
from farthing.model.kernels.native.target import Target
from farthing.model.moe import Router
from farthing.model.rotary import rotate, tables

KINDS = ("int4", "int8", "bfloat16")
FLOAT32 = ("float32",)


def rows_of(*shape, seed=0, spare=32):
    """Normal numbers, as the first elements of memory that ends with zeros: [shape], and all of it."""
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    memory = torch.cat([numbers.flatten(), torch.zeros(spare)])
    return memory[: numbers.numel()].view(shape), memory


def close(got, expected, limit=2e-6, scale=None):
    """Compare with what float64 gives, relative to the largest or to `scale`."""
    scale = (expected.abs().max() if scale is None else scale).clamp_min(1e-6)
    assert float((got.double() - expected.double()).abs().max() / scale) < limit


# ---- products and their weights ----


def multiply(machine, weight, x, kind, mode=STORE, bias=None, y=None, outs=None, exact=None):
    """x W^T by the kernels, from a float32 or bfloat16 weight; returns the rows that a product leaves."""
    kinds = FLOAT32 if kind == "float32" else KINDS
    packer = Packer(kinds)
    count, inputs = weight.shape
    rows = np.arange(count) * inputs if outs is None else np.where(outs < 0, -1, outs * inputs)
    packed = packer.weight(lambda: weight, rows, np.arange(inputs), kinds.index(kind))
    operations, kept = packer.operations()
    machine.run(operations, kinds=kinds)
    x = F.pad(x, (0, packed.inputs - inputs)).contiguous()
    operations, address, pitch = Operations(), x.data_ptr(), 4 * packed.inputs
    quantized = torch.zeros(len(x), 4 * packed.inputs, dtype=torch.uint8)
    if kind.startswith("int"):
        operations.add(
            Code.QUANTIZE, x=address, pitch=pitch, width=packed.inputs, out=quantized.data_ptr(),
            out_pitch=4 * packed.inputs, repeats=1,
        )  # fmt: skip
        address = quantized.data_ptr()
    width = packed.tiles * (16 if mode in (SILU, GELU) else 32)
    y = torch.zeros(len(x), width) if y is None else F.pad(y, (0, width - y.shape[1]))
    bias = None if bias is None else F.pad(bias, (0, packed.tiles * 32 - len(bias)))
    operations.add(
        Code.MULTIPLY, kind=packed.kind, x=address, x_pitch=pitch, x_step=0, k=packed.inputs, w=packed.start,
        w_step=packed.part_bytes, stride=packed.stride, count=packed.tiles, grain=2,
        bias=0 if bias is None else bias.data_ptr(), mode=mode, y=y.data_ptr(), y_pitch=4 * width, y_step=0, parts=1,
    )  # fmt: skip
    machine.run(operations, len(x), kinds, exact)
    del kept
    return y


def values_of(weight, kind):
    if kind.startswith("int"):
        return rounded(weight, kind)
    return weight.bfloat16().float() if kind == "bfloat16" else weight


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("rows", [*range(1, 18), 33])
def test_products_of_any_number_of_rows(machine, kind, rows):
    weight, x = rows_of(96, 160)[0], rows_of(rows, 160, seed=1)[0]
    got = multiply(machine, weight, x, kind)
    close(got, x.double() @ values_of(weight, kind).double().T, 1e-4 if kind.startswith("int") else 2e-6)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize(("rows", "exact"), [(2, 1), (9, 8), (17, 3), (40, 1), (33, 17)])
def test_rows_that_may_be_rounded_stand_behind_those_that_may_not(machine, kind, rows, exact):
    weight, x = rows_of(96, 160)[0], rows_of(rows, 160, seed=1)[0]
    got, alone = (multiply(machine, weight, x, kind, exact=first) for first in (exact, None))
    close(got[:exact], alone[:exact].double(), 1e-6)
    rounds = kind == "bfloat16" and Target(machine.isa).dots
    behind = (x.bfloat16() if rounds else x)[exact:].double() @ values_of(weight, kind).double().T
    close(got[exact:], behind, 1e-4 if kind.startswith("int") else 2e-6)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["bfloat16", "int8", "int4"])
def test_weights_of_either_dtype_pack_to_the_same(machine, kind, stored):
    weight, x = rows_of(64, 96)[0].bfloat16(), rows_of(3, 96, seed=1)[0]
    got = multiply(machine, weight.to(stored), x, kind)
    close(got, x.double() @ values_of(weight.float(), kind).double().T, 1e-4)


@pytest.mark.hypothesis
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(["float32", "bfloat16", "int8", "int4"]),
    outputs=st.integers(1, 130),
    inputs=st.integers(1, 200),
    rows=st.integers(1, 40),
    large=st.sampled_from([1e-3, 1.0, 300.0]),
)
def test_products_of_any_shape(machine, kind, outputs, inputs, rows, large):
    weight, x = rows_of(outputs, inputs)[0], rows_of(rows, inputs, seed=1)[0] * large
    got = multiply(machine, weight, x, kind)[:, :outputs]
    exact = x.double() @ values_of(weight, kind).double().T
    lengths = x.norm(dim=1).max() * weight.norm(dim=1).max()  # terms of both signs may leave a sum near 0
    close(got, exact, 1e-3 if kind.startswith("int") else 1e-6, lengths)  # a tie may be rounded either way


@pytest.mark.parametrize("kind", ["bfloat16", "int8", "int4"])
def test_zeros_and_outliers_are_packed(machine, kind):
    weight = torch.zeros(32, 64)
    weight[3, 7], weight[4] = 5.0, 1.0
    got = multiply(machine, weight, rows_of(2, 64)[0], kind)
    close(got, rows_of(2, 64)[0].double() @ weight.double().T, 1e-3)
    assert not multiply(machine, weight, torch.zeros(2, 64), kind).any()


def test_tiles_are_finished_in_every_way(machine):
    weight, x, before = rows_of(64, 32)[0], rows_of(5, 32, seed=1)[0], rows_of(5, 64, seed=2)[0]
    bias = rows_of(64, seed=3)[0]
    exact = x.double() @ weight.bfloat16().double().T + bias
    close(multiply(machine, weight, x, "bfloat16", bias=bias), exact)
    close(multiply(machine, weight, x, "bfloat16", ADD, bias, before.clone()), exact + before)
    outs = np.arange(64).reshape(2, 2, 16).transpose(1, 0, 2).ravel()  # gate and up in turns
    gate, up = exact[:, :32], exact[:, 32:]
    turned = bias[torch.from_numpy(outs)]
    close(multiply(machine, weight, x, "bfloat16", SILU, turned, outs=outs), F.silu(gate) * up)
    gelu = F.gelu(gate, approximate="tanh") * up
    close(multiply(machine, weight, x, "bfloat16", GELU, turned, outs=outs), gelu)


# ---- rows ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embedding(machine, dtype):
    table, ids = rows_of(11, 20)[0].to(dtype).contiguous(), np.array([3, 0, 10], np.int64)
    out = torch.zeros(3, 32)
    machine.one(
        Code.EMBED, 3, arrays={"ids": ids, "embedding": table.data_ptr()}, stored=dtype.itemsize, width=20, scale=1.5,
        out=out.data_ptr(), pitch=128,
    )  # fmt: skip
    assert torch.equal(out[:, :20], table[torch.from_numpy(ids)].float() * 1.5)


@pytest.mark.parametrize(("width", "groups"), [(16, 1), (40, 1), (24, 3)])
def test_norm(machine, width, groups):
    step = padded(width, 16)
    x = F.pad(rows_of(4, groups, width)[0], (0, step - width)).contiguous()
    weight, before = F.pad(rows_of(width, seed=1)[0], (0, step - width)), rows_of(4, groups, step, seed=2)[0]
    fields = {
        "x": x.data_ptr(), "pitch": 4 * groups * step, "groups": groups, "step": 4 * step, "length": step,
        "width": width, "weight": weight.data_ptr(), "eps": 1e-5, "out_pitch": 4 * groups * step, "out_step": 4 * step,
    }  # fmt: skip
    out, exact = torch.zeros_like(x), F.rms_norm(x[..., :width], (width,), weight[:width], 1e-5)
    machine.one(Code.NORM, 4, out=out.data_ptr(), plus=0, **fields)
    close(out[..., :width], exact)
    machine.one(Code.NORM, 4, out=out.data_ptr(), plus=before.data_ptr(), **fields)
    close(out[..., :width], exact + before[..., :width])


def test_cap(machine):
    x, expected = rows_of(3, 32)[0].clone() * 9, 5 * torch.tanh(rows_of(3, 32)[0] * 9 / 5)
    machine.one(Code.CAP, 3, x=x.data_ptr(), pitch=128, width=32, bound=5.0)
    close(x, expected)


def rotation(width, positions=64):
    cos, sin = tables(ModelConfig(8, 8, 8, 1, 1, 1, 8).rope, width, positions)
    half = width // 2
    return cos[:, :half].contiguous(), sin[:, half:].contiguous(), cos, sin


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_and_what_a_page_holds(machine, dtype):
    heads, groups, width, wide = 3, 2, 20, 32
    x = F.pad(rows_of(4, heads + 2 * groups, width)[0], (0, wide - width)).contiguous()
    q, k, v = x.clone().split([heads, groups, groups], 1)
    half_cos, half_sin, cos, sin = rotation(width)
    at, pages = np.array([0, 17, 33, 63], np.int64), np.array([2, 0, 4, 1], np.int64)
    keys = torch.zeros(5, groups, wide, 16, dtype=dtype)
    values = torch.zeros(5, groups, wide // 16, 16, 16, dtype=dtype)
    machine.one(
        Code.ROTATE, 4, arrays={"positions": at, "pages": pages}, x=x.data_ptr(), pitch=4 * x[0].numel(), heads=heads,
        groups=groups, width=width, padded=wide, cos=half_cos.data_ptr(), sin=half_sin.data_ptr(), keys=keys.data_ptr(),
        values=values.data_ptr(), stored=dtype.itemsize,
    )  # fmt: skip
    c, s = cos[at][:, None], sin[at][:, None]
    close(x[:, :heads, :width], rotate(q[..., :width], c, s))
    rotated = rotate(k[..., :width], c, s)
    for row, (position, page) in enumerate(zip(at, pages, strict=True)):
        close(keys[page, :, :width, position % 16].float(), rotated[row], 5e-3)
        stored = values[page, :, :, position % 16].flatten(1)[:, :width]
        assert torch.equal(stored, v[row, :, :width].to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_and_entries_of_latents(machine, dtype):
    heads, nope, rope, latent = 3, 5, 6, 10
    q, kv = rows_of(2, heads, nope + rope)[0].clone(), rows_of(2, latent + rope, seed=1)[0].clone()
    before, key = q.clone(), kv[:, latent:].clone()
    absorbed, entries = torch.zeros(2, heads, 32), torch.zeros(3, 16, 16, dtype=dtype)
    half_cos, half_sin, cos, sin = rotation(rope)
    at, pages = np.array([5, 22], np.int64), np.array([1, 2], np.int64)
    machine.one(
        Code.ROTATE_LATENT, 2, arrays={"positions": at, "pages": pages}, q=q.data_ptr() + 4 * nope,
        q_pitch=4 * q[0].numel(), q_step=4 * (nope + rope), heads=heads, width=rope, cos=half_cos.data_ptr(),
        sin=half_sin.data_ptr(), absorbed=absorbed.data_ptr() + 4 * latent, absorbed_pitch=4 * heads * 32,
        absorbed_step=4 * 32, latent=kv.data_ptr(), key=kv.data_ptr() + 4 * latent, kv_pitch=4 * (latent + rope),
        latent_width=latent, entries=entries.data_ptr(), entry_width=16, stored=dtype.itemsize,
    )  # fmt: skip
    c, s = cos[at][:, None], sin[at][:, None]
    close(absorbed[:, :, latent : latent + rope], rotate(before[..., nope:], c, s))
    for row, (position, page) in enumerate(zip(at, pages, strict=True)):
        exact = torch.cat([kv[row, :latent], rotate(key[:, None], c, s)[row, 0]])
        close(entries[page, position % 16].float(), exact, 5e-3)


# ---- attention ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("positions", [[0], [15, 16], [3, 700, 1300]])
@pytest.mark.parametrize(
    "rule", [{}, {"window": 9}, {"window": 600}, {"softcap": 1.5}, {"sinks": True}, {"latent": True}]
)
def test_attention(machine, dtype, positions, rule):
    rows, shared, width = len(positions), 5, 32
    latent, window = rule.get("latent", False), rule.get("window", 0)
    groups = 1 if latent else 2
    heads, length = groups * shared, max(positions) + 1
    blocks = -(-length // 16)
    q = rows_of(rows, heads, width)[0]
    k, v = (rows_of(rows, blocks * 16, groups, width, seed=s)[0].to(dtype) for s in (1, 2))
    sinks = rows_of(heads, seed=3)[0]
    tables_ = np.random.default_rng(0).permutation(rows * blocks).astype(np.int64).reshape(rows, blocks)
    at = torch.from_numpy(tables_).flatten()
    if latent:
        value_width, v = 20, k[..., :20]
        keys = torch.zeros(rows * blocks, 16, width, dtype=dtype)
        keys[at] = k.view(-1, 16, width)
        values = keys
    else:
        value_width = width
        keys = torch.zeros(rows * blocks, groups, width, 16, dtype=dtype)
        keys[at] = k.view(-1, 16, groups, width).permute(0, 2, 3, 1)
        values = torch.zeros(rows * blocks, groups, width // 16, 16, 16, dtype=dtype)
        values[at] = v.reshape(-1, 16, groups, width // 16, 16).permute(0, 2, 3, 1, 4)
    spans = -(-length // SPAN)
    wide = padded(value_width, 16)
    partial = torch.empty(rows * heads * spans * (16 + wide)).fill_(math.nan)
    ended, out = torch.zeros(rows * groups, dtype=torch.int64), torch.zeros(rows, heads, wide)
    for _ in range(2):  # the second time, every counter has been reset
        machine.one(
            Code.ATTEND, rows,
            arrays={
                "positions": np.array(positions, np.int64), "tables": tables_,
                "table_bytes": 8 * blocks, "spans": spans,
            },
            q=q.data_ptr(), q_pitch=4 * heads * width, groups=groups, shared=shared, latent=latent, width=width,
            q_step=4 * width, keys=keys.data_ptr(), values=values.data_ptr(), page_bytes=keys[0].nbytes,
            value_width=value_width, stored=dtype.itemsize, window=window, softcap=float(rule.get("softcap", 0.0)),
            sinks=sinks.data_ptr() if "sinks" in rule else 0, scale=0.2, partial=partial.data_ptr(),
            ended=ended.data_ptr(), out=out.data_ptr(), out_pitch=4 * heads * wide, each=1,
        )  # fmt: skip
        for row, position in enumerate(positions):
            first = max(0, position + 1 - window) if window else 0
            seen = slice(first, position + 1)
            for head in range(heads):
                keys_, values_ = (t[row, seen, head // shared].double() for t in (k, v))
                scores = keys_ @ q[row, head].double() * 0.2
                if "softcap" in rule:
                    scores = 1.5 * torch.tanh(scores / 1.5)
                if "sinks" in rule:
                    scores = torch.cat([scores, sinks[head : head + 1].double()])
                weights = scores.softmax(-1)[: len(keys_)]
                close(out[row, head, :value_width], weights @ values_, 1e-5)


# ---- experts ----


@pytest.mark.parametrize(
    "changed",
    [{}, {"groups": 4, "top_groups": 2}, {"groups": 4, "top_groups": 2, "bias": False},
     {"scoring": "softmax", "normalise": False, "bias": False}, {"router_bias": True, "scale": 2.5}],
)  # fmt: skip
def test_routing(machine, changed):
    moe = Moe(**{"experts": 12, "top_k": 3, "expert_size": 8, **changed})
    router = Router(ModelConfig(8, 24, 8, 1, 1, 1, 8, moe=moe), 0)
    x = rows_of(9, 24)[0]
    with torch.no_grad():
        for seed, parameter in enumerate(router.parameters()):
            parameter.copy_(rows_of(*parameter.shape, seed=seed + 1)[0] * 0.3)
        gates, chosen = router(x, None)
        logits = F.pad(x @ router.weight.T, (0, 20)).contiguous()
    found, found_gates = torch.zeros(9, 3, dtype=torch.int64), torch.zeros(9, 3)
    machine.one(
        Code.ROUTE, 9, logits=logits.data_ptr(), pitch=128, experts=12, top_k=3, groups=moe.groups,
        top_groups=moe.top_groups, softmax=moe.scoring == "softmax", normalise=moe.normalise, scale=float(moe.scale),
        logit_bias=router.logit_bias.data_ptr() if router.logit_bias is not None else 0,
        bias=router.bias.data_ptr() if router.bias is not None else 0, chosen=found.data_ptr(),
        gates=found_gates.data_ptr(),
    )  # fmt: skip
    order, expected = found.argsort(-1), chosen.argsort(-1)
    assert torch.equal(found.gather(1, order), chosen.gather(1, expected))
    close(found_gates.gather(1, order), gates.gather(1, expected), 1e-5)


@pytest.mark.parametrize("experts_", [1, 5, 40])
def test_rows_are_sorted_by_expert(machine, experts_):
    chosen = torch.randint(0, experts_, (11, 2), generator=torch.Generator().manual_seed(0))
    places = torch.full((22,), -1)
    members = torch.zeros(experts_ + 2, dtype=torch.int64)
    members[0] = places.data_ptr()
    machine.one(
        Code.ASSIGN, 11, chosen=chosen.data_ptr(), experts=experts_, top_k=2, members=members.data_ptr() + 8
    )
    starts = members[1:].tolist()
    assert starts == [0, *chosen.flatten().bincount(minlength=experts_).cumsum(0).tolist()]
    for expert in range(experts_):
        mine = (chosen.flatten() == expert).nonzero()[:, 0].tolist()
        assert places[starts[expert] : starts[expert + 1]].tolist() == mine


# ---- sampling ----


@pytest.mark.parametrize("entries", [1, 2, 31, 512, 513, 2000])
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_drawing(machine, entries, temperature):
    rows, width = 12, padded(entries)
    logits = F.pad(rows_of(rows, entries)[0] * 3, (0, width - entries)).contiguous()
    uniforms = np.linspace(0, 1, rows, endpoint=False)
    uniforms[-1] = 1 - 1e-12
    sampling = Sampling(temperature=temperature)
    expected = choose(logits[:, :entries].clone(), [Row(sampling, uniform) for uniform in uniforms.tolist()])
    ids, logprobs, entropies = (
        np.zeros(rows, np.int64),
        np.zeros(rows, np.float32),
        np.zeros(rows, np.float32),
    )
    arrays = {
        "temperatures": np.full(rows, temperature, np.float32), "uniforms": uniforms, "chosen": ids,
        "logprobs": logprobs, "entropies": entropies,
    }  # fmt: skip
    machine.one(
        Code.DRAW,
        rows,
        arrays=arrays,
        logits=logits.data_ptr(),
        pitch=4 * width,
        entries=entries,
        padded=width,
    )
    assert ids.tolist() == expected.ids
    np.testing.assert_allclose(logprobs, expected.logprobs, atol=1e-5)
    np.testing.assert_allclose(entropies, expected.entropies, atol=1e-5)


def drawn(machine, logits, entries, temperature):
    """The token in a row of 32 logits, its log-probability and the entropy."""
    ids = np.zeros(1, np.int64)
    floats = [np.zeros(1, np.float32) for _ in range(2)]
    arrays = {
        "temperatures": np.array([temperature], np.float32), "uniforms": np.array([1 - 1e-16]), "chosen": ids,
        "logprobs": floats[0], "entropies": floats[1],
    }  # fmt: skip
    machine.one(Code.DRAW, 1, arrays=arrays, logits=logits.data_ptr(), pitch=128, entries=entries, padded=32)
    return ids[0], floats[0][0], floats[1][0]


def test_a_token_without_weight_is_never_drawn(machine):
    logits = torch.full((1, 32), -1e4)
    logits[0, 4] = 0.0
    assert drawn(machine, logits, 20, 1.0)[0] == 4


@pytest.mark.parametrize("temperature", [1e-7, 1e-20])
def test_the_tiniest_temperatures_draw_the_likeliest(machine, temperature):
    assert drawn(machine, F.pad(torch.arange(20.0), (0, 12))[None], 20, temperature) == (
        19,
        0.0,
        pytest.approx(0, abs=1e-5),
    )


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize(
    "broken", [[-1e38] * 20, [0.0] * 7 + [float("nan")] + [0.0] * 12, [-float("inf")] * 20]
)
def test_broken_logits_give_a_token_of_the_vocabulary(machine, broken, temperature):
    logits = F.pad(torch.tensor([broken]), (0, 12))
    token, logprob, _ = drawn(machine, logits, 20, temperature)
    assert 0 <= token < 20
    if np.isnan(broken).any():
        assert np.isnan(logprob)


# ---- what both sides agree on ----


@pytest.mark.parametrize(
    ("code", "function"),
    [
        (Code.EMBED, rowwise.embed), (Code.NORM, rowwise.norm), (Code.QUANTIZE, rowwise.quantize),
        (Code.ROTATE, rowwise.rotate), (Code.ROTATE_LATENT, rowwise.rotate_latent), (Code.CAP, rowwise.cap),
        (Code.ATTEND, attend.attend), (Code.ROUTE, experts.route), (Code.ASSIGN, experts.assign),
        (Code.DRAW, draw.draw), (Code.PACK, pack.pack), (Code.MULTIPLY, ("def multiply", matmul.multiplier)),
        (Code.EXPERTS_UP, ("def experts_up", matmul.multiplier)),
        (Code.EXPERTS_DOWN, ("def experts_down", matmul.multiplier)),
    ],
)  # fmt: skip
def test_the_compiled_code_unpacks_the_fields_in_their_order(code, function):
    """A field that nothing reads is `_`."""
    start, function = function if isinstance(function, tuple) else ("", function)
    source = inspect.getsource(getattr(function, "py_func", function))
    source = source[source.index(start) :]
    names = re.search(r"\(?_, ([\w\s,]+?)\)?\s*=\s*\(?\s*fields\(\s*op, (\d+)\s*\)", source)
    expected = FIELDS[code].split()
    assert len(expected) == int(names[2]) - 1
    for ours, theirs in zip(names[1].replace("\n", " ").split(","), expected, strict=True):
        assert ours.strip() in (theirs, "_")


def test_spread_leaves_gaps():
    assert spread(2, 3, 4).tolist() == [0, 1, 2, -1, 3, 4, 5, -1]
