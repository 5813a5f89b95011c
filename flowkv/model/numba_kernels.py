"""Loops over the KV pool that torch has no operator for, compiled by Numba for the CPU they run on.

bfloat16 and float16 are unknown to NumPy and Numba: an array of bfloat16 comes as its bits in uint16, one of float16
as its bits in int16, and the type says how to widen them. Numba does not vectorise the loops well by itself, so the
two that matter are written in LLVM vectors of 16 lanes; sums are kept in float32.

Compiled code is cached on disk, beside this file or in the user's cache folder. Numba compiles again when this file
changes, but not when one that it imports does: whatever gets compiled in must stay in here.
"""

from collections.abc import Callable
from typing import Any

import numba.extending
import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import cgutils, types
from numba.core.errors import TypingError

intrinsic: Callable[[Callable[..., Any]], Any] = numba.extending.intrinsic

LANES = 16
CACHE_LINE_BYTES = 64
LOWEST = np.float32(-1e30)
LOG2_E = np.float32(1.4426950408889634)
FASTMATH = {"reassoc", "contract", "nsz", "arcp"}  # not nnan: a NaN must stay one, so that the sampler can refuse it
FLOAT = ir.FloatType()
VECTOR = ir.VectorType(FLOAT, LANES)
KINDS = {1: FLOAT, LANES: VECTOR}
STORAGE = {types.float32: FLOAT, types.uint16: ir.IntType(16), types.int16: ir.HalfType()}


def storage_of(array: Any) -> Any:
    if array.dtype not in STORAGE or array.ndim != 1 or array.layout != "C":
        raise TypingError(f"a flat array of float32, uint16 or int16 is wanted, not {array}")
    return STORAGE[array.dtype]


def widened(builder: Any, value: Any, storage: Any, lanes: int) -> Any:
    """float32 of stored elements; `lanes` 1 is a scalar."""
    if storage == FLOAT:
        return value
    target = VECTOR if lanes > 1 else FLOAT
    if storage == ir.HalfType():
        return builder.fpext(value, target)
    wide = ir.VectorType(ir.IntType(32), lanes) if lanes > 1 else ir.IntType(32)
    shift = ir.Constant(wide, [16] * lanes if lanes > 1 else 16)
    return builder.bitcast(builder.shl(builder.zext(value, wide), shift), target)


def load(builder: Any, pointer: Any, index: Any, storage: Any, lanes: int) -> Any:
    """float32 of `lanes` stored elements from `pointer[index]` on."""
    element = ir.VectorType(storage, lanes) if lanes > 1 else storage
    place = builder.bitcast(builder.gep(pointer, [index]), element.as_pointer())
    return widened(builder, builder.load(place, align=4 if storage == FLOAT else 2), storage, lanes)


def row_pointer(context: Any, builder: Any, array_type: Any, array: Any, offset: Any, storage: Any) -> Any:
    data = context.make_array(array_type)(context, builder, array).data
    return builder.gep(builder.bitcast(data, storage.as_pointer()), [offset])


def multiply_add(builder: Any, x: Any, y: Any, total: Any) -> Any:
    return builder.fadd(builder.fmul(x, y, flags=("contract",)), total, flags=("contract",))


def spread(builder: Any, value: Any, lanes: int) -> Any:
    """The same float32 in every lane."""
    if lanes == 1:
        return value
    single = builder.insert_element(ir.Constant(VECTOR, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
    return builder.shuffle_vector(single, ir.Constant(VECTOR, ir.Undefined), zeros)


def horizontal_sum(builder: Any, vector: Any) -> Any:
    width = LANES
    while width > 1:
        half = width // 2
        undefined = ir.Constant(vector.type, ir.Undefined)
        masks = [ir.Constant(ir.VectorType(ir.IntType(32), half), list(range(s, s + half))) for s in (0, half)]
        low, high = (builder.shuffle_vector(vector, undefined, mask) for mask in masks)
        vector, width = builder.fadd(low, high), half
    return builder.extract_element(vector, ir.Constant(ir.IntType(32), 0))


def stack_slot(builder: Any, kind: Any) -> Any:
    """A place for one value, made once a call of the function, however deep in its loops."""
    with builder.goto_entry_block():
        return builder.alloca(kind)


def for_lanes(builder: Any, count: Any, body: Any) -> None:
    """`body(index, lanes)` over `count` elements: whole vectors, then what is left one by one."""
    whole = builder.udiv(count, ir.Constant(count.type, LANES))
    with cgutils.for_range(builder, whole) as loop:
        body(builder.mul(loop.index, ir.Constant(count.type, LANES)), LANES)
    rest = builder.mul(whole, ir.Constant(count.type, LANES))
    with cgutils.for_range(builder, builder.sub(count, rest)) as loop:
        body(builder.add(rest, loop.index), 1)


@intrinsic
def dot_rows(
    typing_context: Any, out: Any, out_offset: Any, x: Any, x_offset: Any, rows: Any, rows_offset: Any, stride: Any,
    num_rows: Any, count: Any,
) -> Any:  # fmt: skip
    """out[r] = sum of x[i] * rows[r * stride + i] over i < count, for r < num_rows; out and x float32."""
    storage = storage_of(rows)

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        target = row_pointer(context, builder, out, args[0], args[1], FLOAT)
        left = row_pointer(context, builder, x, args[2], args[3], FLOAT)
        first = row_pointer(context, builder, rows, args[4], args[5], storage)
        sums = {lanes: stack_slot(builder, kind) for lanes, kind in KINDS.items()}
        with cgutils.for_range(builder, args[7]) as row:
            right = builder.gep(first, [builder.mul(row.index, args[6])])
            for lanes, place in sums.items():
                builder.store(ir.Constant(KINDS[lanes], None), place)

            def body(index: Any, lanes: int) -> None:
                a = load(builder, left, index, FLOAT, lanes)
                b = load(builder, right, index, storage, lanes)
                builder.store(multiply_add(builder, a, b, builder.load(sums[lanes])), sums[lanes])

            for_lanes(builder, args[8], body)
            total = builder.fadd(horizontal_sum(builder, builder.load(sums[LANES])), builder.load(sums[1]))
            builder.store(total, builder.gep(target, [row.index]))
        return context.get_dummy_value()

    integers = [types.intp] * 3
    return types.none(out, types.intp, x, types.intp, rows, types.intp, *integers), code


@intrinsic
def add_weighted_rows(
    typing_context: Any, out: Any, out_offset: Any, shrink: Any, weights: Any, weights_offset: Any, rows: Any,
    rows_offset: Any, stride: Any, num_rows: Any, count: Any,
) -> Any:  # fmt: skip
    """out[i] = out[i] * shrink + sum of weights[r] * rows[r * stride + i] over r, for i < count."""
    storage = storage_of(rows)

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        target = row_pointer(context, builder, out, args[0], args[1], FLOAT)
        weight = row_pointer(context, builder, weights, args[3], args[4], FLOAT)
        first = row_pointer(context, builder, rows, args[5], args[6], storage)
        sums = {lanes: stack_slot(builder, kind) for lanes, kind in KINDS.items()}

        def body(index: Any, lanes: int) -> None:
            place = builder.bitcast(builder.gep(target, [index]), KINDS[lanes].as_pointer())
            old = load(builder, target, index, FLOAT, lanes)
            builder.store(builder.fmul(old, spread(builder, args[2], lanes)), sums[lanes])
            with cgutils.for_range(builder, args[8]) as row:
                at = builder.add(builder.mul(row.index, args[7]), index)
                value = load(builder, first, at, storage, lanes)
                factor = spread(builder, builder.load(builder.gep(weight, [row.index])), lanes)
                builder.store(multiply_add(builder, value, factor, builder.load(sums[lanes])), sums[lanes])
            builder.store(builder.load(sums[lanes]), place, align=4)

        for_lanes(builder, args[9], body)
        return context.get_dummy_value()

    integers = [types.intp] * 3
    return types.none(out, types.intp, types.float32, weights, types.intp, rows, types.intp, *integers), code


@intrinsic
def prefetch(typing_context: Any, array: Any, offset: Any, count: Any) -> Any:
    """Ask for `count` elements from `offset` on to be brought into the second-level cache. Any address is safe."""
    storage = storage_of(array)

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = row_pointer(context, builder, array, args[0], args[1], storage)
        number = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [storage.as_pointer(), number, number, number])
        name = f"llvm.prefetch.p0{storage.intrinsic_name}"
        call = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
        line = ir.Constant(args[2].type, CACHE_LINE_BYTES // (4 if storage == FLOAT else 2))
        lines = builder.udiv(builder.add(args[2], builder.sub(line, ir.Constant(line.type, 1))), line)
        with cgutils.for_range(builder, lines) as loop:
            place = builder.gep(data, [builder.mul(loop.index, line)])
            builder.call(call, [place, *(ir.Constant(number, flag) for flag in (0, 2, 1))])  # read, L2, data
        return context.get_dummy_value()

    return types.none(array, types.intp, types.intp), code


@intrinsic
def float32_of_bits(typing_context: Any, bits: Any) -> Any:
    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], FLOAT)

    return types.float32(types.int32), code


@numba.njit(inline="always", fastmath=FASTMATH)
def exp_nonpositive(x: Any) -> Any:
    """e^x for x <= 0 in float32, within 3e-7 of itself; unlike libm's it can be vectorised.

    2^(n + f), with the Taylor polynomial of 2^f for |f| <= 1/2; below 2^-126 it is 0.
    """
    scaled = x * LOG2_E
    scaled = np.float32(-127.0) if scaled < np.float32(-127.0) else scaled  # a NaN stays one
    whole = np.floor(scaled + np.float32(0.5))
    f = scaled - whole
    p = np.float32(1.5403530e-4)
    p = p * f + np.float32(1.3333558e-3)
    p = p * f + np.float32(9.6181291e-3)
    p = p * f + np.float32(5.5504109e-2)
    p = p * f + np.float32(2.4022651e-1)
    p = p * f + np.float32(6.9314718e-1)
    p = p * f + np.float32(1.0)
    return p * float32_of_bits((np.int32(whole) + np.int32(127)) << np.int32(23))


@numba.njit(nogil=True, cache=True)
def write_kv(key: Any, value: Any, pool: Any, layer: int, blocks: Any, offsets: Any) -> None:
    """key, value [T, Hkv, D] into slots (blocks[t], offsets[t]) of pool [B, L, 2, S, Hkv, D]."""
    for token in range(key.shape[0]):
        block, offset = blocks[token], offsets[token]
        for head in range(key.shape[1]):
            for d in range(key.shape[2]):
                pool[block, layer, 0, offset, head, d] = key[token, head, d]
                pool[block, layer, 1, offset, head, d] = value[token, head, d]


@numba.njit(nogil=True, cache=True)
def gather_kv(pool: Any, layer: int, table: Any, start: int, key: Any, value: Any) -> None:
    """Positions from `start` on of one sequence, out of the pool into key, value [Hkv, n, D]."""
    block_size = pool.shape[3]
    for i in range(key.shape[1]):
        block, offset = table[(start + i) // block_size], (start + i) % block_size
        for head in range(key.shape[0]):
            for d in range(key.shape[2]):
                key[head, i, d] = pool[block, layer, 0, offset, head, d]
                value[head, i, d] = pool[block, layer, 1, offset, head, d]


@numba.njit(nogil=True, cache=True, fastmath=FASTMATH)
def decode(
    query: Any, pool: Any, layer: int, rows: Any, items: Any, tables: Any, contexts: Any,
    window: int, softcap: Any, out: Any,
) -> None:  # fmt: skip
    """Attention of single-token stretches into out [T, H, D], straight from the pool's blocks.

    query [T, H, D] float32, scaled already. Blocks are the outer loop and heads the inner, so that memory is read in
    order, and each KV head's rows serve its whole group of query heads from the cache. The softmax is online, block
    after block. `window` and `softcap` 0 mean none.
    """
    num_layers, block_size, num_kv_heads, head_dim = pool.shape[1], pool.shape[3], pool.shape[4], pool.shape[5]
    num_heads = query.shape[1]
    group = num_heads // num_kv_heads
    flat_pool, flat_query, flat_out = pool.reshape(-1), query.reshape(-1), out.reshape(-1)
    stride = num_kv_heads * head_dim
    half = block_size * stride  # from a slot's K to its V
    share = 2 * half // num_heads  # of the next block, asked for with each head
    score = np.empty(block_size, np.float32)
    highest, weight = np.empty(num_heads, np.float32), np.empty(num_heads, np.float32)
    for i in range(len(rows)):
        context = contexts[items[i]]
        first = max(0, context - window) if window > 0 else 0
        base = rows[i] * num_heads * head_dim
        flat_out[base : base + num_heads * head_dim] = np.float32(0.0)
        highest[:], weight[:] = LOWEST, np.float32(0.0)
        last = (context + block_size - 1) // block_size
        for index in range(first // block_size, last):
            low = max(0, first - index * block_size)
            count = min(block_size, context - index * block_size) - low
            start = (np.intp(tables[items[i], index]) * num_layers + layer) * 2 * half + low * stride
            following = np.intp(tables[items[i], min(index + 1, last - 1)]) * num_layers + layer
            for head in range(num_heads):
                prefetch(flat_pool, following * 2 * half + head * share, share)
                key, place = start + head // group * head_dim, base + head * head_dim
                dot_rows(score, 0, flat_query, place, flat_pool, key, stride, count, head_dim)
                shrink = absorb(score[:count], head, highest, weight, softcap)
                add_weighted_rows(flat_out, place, shrink, score, 0, flat_pool, key + half, stride, count, head_dim)
        for head in range(num_heads):
            for d in range(base + head * head_dim, base + (head + 1) * head_dim):
                flat_out[d] /= weight[head]


@numba.njit(inline="always", fastmath=FASTMATH)
def absorb(score: Any, head: int, highest: Any, weight: Any, softcap: Any) -> Any:
    """One block's scores into a head's running softmax: they become weights. Returns by how much older sums shrink."""
    if softcap > 0:
        for t in range(len(score)):
            score[t] = softcap * np.tanh(score[t] / softcap)
    peak = highest[head]
    for t in range(len(score)):
        peak = max(peak, score[t])
    shrink = exp_nonpositive(highest[head] - peak)
    added = np.float32(0.0)
    for t in range(len(score)):
        score[t] = exp_nonpositive(score[t] - peak)
        added += score[t]
    highest[head] = peak
    weight[head] = weight[head] * shrink + added
    return shrink
