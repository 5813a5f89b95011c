"""Loops over the KV pool that torch has no operator for, compiled by Numba for the CPU they run on.

bfloat16 and float16 are unknown to NumPy and Numba: an array of bfloat16 comes as its bits in uint16, one of float16
as its bits in int16, and the type says how to widen them. Numba does not vectorise the loops well by itself, so the
two that matter are written in LLVM vectors of 16 lanes; sums are kept in float32.

"""

from collections.abc import Callable
from typing import Any

import numba.extending
import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import cgutils, types
from numba.core.errors import TypingError

from flowkv.model.jit import compiled

intrinsic: Callable[[Callable[..., Any]], Any] = numba.extending.intrinsic

LANES = 16
COLUMNS = 4  # vectors of a row that are summed beside each other
CACHE_LINE_BYTES = 64
GROUP = 8  # rows whose sums grow beside each other: more pointers than that spill
PART = 512  # logits whose highest is found at a time
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


def narrowed(builder: Any, value: Any, storage: Any, lanes: int) -> Any:
    """What is stored for a float32, rounded to the nearest, ties to even. A NaN made by arithmetic stays one."""
    if storage == FLOAT:
        return value
    if storage == ir.HalfType():
        return builder.fptrunc(value, ir.VectorType(storage, lanes) if lanes > 1 else storage)
    wide, short = (ir.VectorType(ir.IntType(n), lanes) if lanes > 1 else ir.IntType(n) for n in (32, 16))

    def constant(number: int) -> Any:
        return ir.Constant(wide, [number] * lanes if lanes > 1 else number)

    bits = builder.bitcast(value, wide)
    odd = builder.and_(builder.lshr(bits, constant(16)), constant(1))
    rounded = builder.add(builder.add(bits, constant(0x7FFF)), odd)
    return builder.trunc(builder.lshr(rounded, constant(16)), short)


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


def folded(builder: Any, vector: Any, combine: Any) -> Any:
    """A scalar: all lanes, halves by halves."""
    width = LANES
    while width > 1:
        half = width // 2
        undefined = ir.Constant(vector.type, ir.Undefined)
        masks = [ir.Constant(ir.VectorType(ir.IntType(32), half), list(range(s, s + half))) for s in (0, half)]
        low, high = (builder.shuffle_vector(vector, undefined, mask) for mask in masks)
        vector, width = combine(low, high), half
    return builder.extract_element(vector, ir.Constant(ir.IntType(32), 0))


def declared(builder: Any, name: str, result: Any, arguments: list[Any]) -> Any:
    """LLVM's function of that name, in the module that is being built."""
    kind = ir.FunctionType(result, arguments)
    return builder.module.globals.get(name) or ir.Function(builder.module, kind, name)


def stack_slot(builder: Any, kind: Any) -> Any:
    """A place for one value, made once a call of the function, however deep in its loops."""
    with builder.goto_entry_block():
        return builder.alloca(kind)


def for_widths(builder: Any, count: Any, widths: tuple[int, ...], body: Any) -> None:
    """`body(index, width)` over `count` elements: as many of the first width as there are whole, then of the next."""
    done = ir.Constant(count.type, 0)
    for width in widths:
        size = ir.Constant(count.type, width)
        whole = builder.udiv(builder.sub(count, done), size)
        with cgutils.for_range(builder, whole) as loop:
            body(builder.add(done, builder.mul(loop.index, size)), width)
        done = builder.add(done, builder.mul(whole, size))


def sums_of(builder: Any, vectors: list[Any]) -> Any:
    """Lane i is the sum of vector i, for `LANES` vectors: adds of halves, a quarter of the shuffles of single sums."""
    width = 1
    while len(vectors) > 1:
        lanes = [lane // (2 * width) * 2 * width + lane % width for lane in range(LANES)]
        low = [lane + LANES * (i % (2 * width) >= width) for i, lane in enumerate(lanes)]
        masks = [ir.Constant(ir.VectorType(ir.IntType(32), LANES), [x + part for x in low]) for part in (0, width)]
        vectors = [
            builder.fadd(*(builder.shuffle_vector(first, second, mask) for mask in masks))
            for first, second in zip(vectors[::2], vectors[1::2], strict=True)
        ]
        width *= 2
    return vectors[0]


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
        sums = {lanes: [stack_slot(builder, kind) for _ in range(LANES)] for lanes, kind in KINDS.items()}

        def some_rows(row: Any, num: int) -> None:
            """`num` at a time: as many sums grow beside each other, and share what is loaded of x."""
            for place in (place for places in sums.values() for place in places[:num]):
                builder.store(ir.Constant(place.type.pointee, None), place)
            for begin in range(0, num, GROUP):
                group = range(begin, min(num, begin + GROUP))
                starts = [builder.mul(builder.add(row, ir.Constant(row.type, i)), args[6]) for i in group]
                pointers = [builder.gep(first, [start]) for start in starts]

                def body(index: Any, lanes: int, group: range = group, pointers: list[Any] = pointers) -> None:
                    a = load(builder, left, index, FLOAT, lanes)
                    for i, pointer in zip(group, pointers, strict=True):
                        b = load(builder, pointer, index, storage, lanes)
                        place = sums[lanes][i]
                        builder.store(multiply_add(builder, a, b, builder.load(place)), place)

                for_widths(builder, args[8], (LANES, 1), body)
            vectors = [builder.load(place) for place in sums[LANES][:num]]
            where = builder.gep(target, [row])
            if num == 1:
                builder.store(builder.fadd(folded(builder, vectors[0], builder.fadd), builder.load(sums[1][0])), where)
                return
            total = sums[LANES][0]
            builder.store(sums_of(builder, vectors), total)
            rest = builder.urem(args[8], ir.Constant(args[8].type, LANES))
            with builder.if_then(builder.icmp_unsigned("!=", rest, ir.Constant(rest.type, 0))):
                for i, place in enumerate(sums[1]):
                    lane = ir.Constant(ir.IntType(32), i)
                    value = builder.fadd(builder.extract_element(builder.load(total), lane), builder.load(place))
                    builder.store(builder.insert_element(builder.load(total), value, lane), total)
            builder.store(builder.load(total), builder.bitcast(where, VECTOR.as_pointer()), align=4)

        for_widths(builder, args[7], (LANES, 1), some_rows)
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
        sums = {lanes: [stack_slot(builder, kind) for _ in range(COLUMNS)] for lanes, kind in KINDS.items()}

        def body(index: Any, width: int) -> None:
            """Columns beside each other, so that their sums grow at the same time."""
            lanes = min(width, LANES)
            places = sums[lanes][: width // lanes]
            columns = [builder.add(index, ir.Constant(index.type, i * lanes)) for i in range(len(places))]
            for column, place in zip(columns, places, strict=True):
                old = load(builder, target, column, FLOAT, lanes)
                builder.store(builder.fmul(old, spread(builder, args[2], lanes)), place)
            with cgutils.for_range(builder, args[8]) as row:
                factor = spread(builder, builder.load(builder.gep(weight, [row.index])), lanes)
                start = builder.mul(row.index, args[7])
                for column, place in zip(columns, places, strict=True):
                    value = load(builder, first, builder.add(start, column), storage, lanes)
                    builder.store(multiply_add(builder, value, factor, builder.load(place)), place)
            for column, place in zip(columns, places, strict=True):
                where = builder.bitcast(builder.gep(target, [column]), KINDS[lanes].as_pointer())
                builder.store(builder.load(place), where, align=4)

        for_widths(builder, args[9], (COLUMNS * LANES, LANES, 1), body)
        return context.get_dummy_value()

    integers = [types.intp] * 3
    return types.none(out, types.intp, types.float32, weights, types.intp, rows, types.intp, *integers), code


@intrinsic
def widen_row(
    typing_context: Any, out: Any, out_offset: Any, row: Any, row_offset: Any, factor: Any, count: Any
) -> Any:  # fmt: skip
    """out[i] = row[i] * factor for i < count; out float32."""
    storage = storage_of(row)

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        target = row_pointer(context, builder, out, args[0], args[1], FLOAT)
        source = row_pointer(context, builder, row, args[2], args[3], storage)

        def body(index: Any, lanes: int) -> None:
            value = builder.fmul(load(builder, source, index, storage, lanes), spread(builder, args[4], lanes))
            place = builder.bitcast(builder.gep(target, [index]), KINDS[lanes].as_pointer())
            builder.store(value, place, align=4)

        for_widths(builder, args[5], (LANES, 1), body)
        return context.get_dummy_value()

    return types.none(out, types.intp, row, types.intp, types.float32, types.intp), code


@intrinsic
def narrow_row(
    typing_context: Any, out: Any, out_offset: Any, row: Any, row_offset: Any, count: Any
) -> Any:  # fmt: skip
    """out[i] = row[i] for i < count, as `out` stores it; row float32."""
    storage = storage_of(out)

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        target = row_pointer(context, builder, out, args[0], args[1], storage)
        source = row_pointer(context, builder, row, args[2], args[3], FLOAT)

        def body(index: Any, lanes: int) -> None:
            value = narrowed(builder, load(builder, source, index, FLOAT, lanes), storage, lanes)
            element = ir.VectorType(storage, lanes) if lanes > 1 else storage
            place = builder.bitcast(builder.gep(target, [index]), element.as_pointer())
            builder.store(value, place, align=4 if storage == FLOAT else 2)

        for_widths(builder, args[4], (LANES, 1), body)
        return context.get_dummy_value()

    return types.none(out, types.intp, row, types.intp, types.intp), code


@intrinsic
def prefetch(typing_context: Any, array: Any, offset: Any, count: Any) -> Any:
    """Ask for `count` elements from `offset` on to be brought into the caches. Any address is safe."""
    storage = storage_of(array)

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = row_pointer(context, builder, array, args[0], args[1], storage)
        number = ir.IntType(32)
        name = f"llvm.prefetch.p0{storage.intrinsic_name}"
        call = declared(builder, name, ir.VoidType(), [storage.as_pointer(), number, number, number])
        line = ir.Constant(args[2].type, CACHE_LINE_BYTES // (4 if storage == FLOAT else 2))
        lines = builder.udiv(builder.add(args[2], builder.sub(line, ir.Constant(line.type, 1))), line)
        with cgutils.for_range(builder, lines) as loop:
            place = builder.gep(data, [builder.mul(loop.index, line)])
            builder.call(call, [place, *(ir.Constant(number, flag) for flag in (0, 3, 1))])  # read, nearest, data
        return context.get_dummy_value()

    return types.none(array, types.intp, types.intp), code


@intrinsic
def highest(typing_context: Any, row: Any, offset: Any, count: Any) -> Any:
    """The highest of row[offset : offset + count] as float32; NaN if there is one."""
    storage = storage_of(row)

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = row_pointer(context, builder, row, args[0], args[1], storage)
        peaks = {lanes: stack_slot(builder, kind) for lanes, kind in KINDS.items()}
        for lanes, place in peaks.items():
            builder.store(spread(builder, ir.Constant(FLOAT, float("-inf")), lanes), place)

        def higher(a: Any, b: Any) -> Any:
            width = "" if a.type == FLOAT else f"v{a.type.count}"
            name = f"llvm.maximum.{width}f32"
            return builder.call(declared(builder, name, a.type, [a.type, a.type]), [a, b])

        def body(index: Any, lanes: int) -> None:
            value = load(builder, data, index, storage, lanes)
            builder.store(higher(value, builder.load(peaks[lanes])), peaks[lanes])

        for_widths(builder, args[2], (LANES, 1), body)
        return higher(folded(builder, builder.load(peaks[LANES]), higher), builder.load(peaks[1]))

    return types.float32(row, types.intp, types.intp), code


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


@compiled(nogil=True)
def write_kv(key: Any, value: Any, pool: Any, layer: int, blocks: Any, offsets: Any) -> None:
    """key, value [T, Hkv, D] into slots (blocks[t], offsets[t]) of pool [B, L, 2, S, Hkv, D]."""
    for token in range(key.shape[0]):
        block, offset = blocks[token], offsets[token]
        for head in range(key.shape[1]):
            for d in range(key.shape[2]):
                pool[block, layer, 0, offset, head, d] = key[token, head, d]
                pool[block, layer, 1, offset, head, d] = value[token, head, d]


@compiled(nogil=True)
def gather_kv(pool: Any, layer: int, table: Any, start: int, key: Any, value: Any) -> None:
    """Positions from `start` on of one sequence, out of the pool into key, value [Hkv, n, D]."""
    block_size = pool.shape[3]
    for i in range(key.shape[1]):
        block, offset = table[(start + i) // block_size], (start + i) % block_size
        for head in range(key.shape[0]):
            for d in range(key.shape[2]):
                key[head, i, d] = pool[block, layer, 0, offset, head, d]
                value[head, i, d] = pool[block, layer, 1, offset, head, d]


@compiled(nogil=True, fastmath=FASTMATH)
def decode(
    query: Any, scale: Any, pool: Any, layer: int, rows: Any, items: Any, tables: Any, contexts: Any,
    window: int, softcap: Any, out: Any,
) -> None:  # fmt: skip
    """Attention of single-token stretches into out [T, H, D], straight from the pool's blocks.

    query [T, H, D], stored like `out`; other rows of `out` are left alone. All scores come first, then the softmax of
    each head, then the weighted values. Blocks are the outer loop and heads the inner, so that memory is read in order
    and each KV head's rows serve its whole group of query heads from the cache. `window` and `softcap` 0 mean none.
    """
    num_layers, block_size, num_kv_heads, head_dim = pool.shape[1], pool.shape[3], pool.shape[4], pool.shape[5]
    num_heads = query.shape[1]
    group, size = num_heads // num_kv_heads, num_heads * head_dim
    flat_pool, stored_query, stored_out = pool.reshape(-1), query.reshape(-1), out.reshape(-1)
    stride = num_kv_heads * head_dim
    half = block_size * stride  # from a slot's K to its V
    share = (half + num_heads - 1) // num_heads  # of the next block, asked for with each head
    scaled, sums = np.empty(size, np.float32), np.empty(size, np.float32)
    room = tables.shape[1] * block_size + LANES
    scores = np.empty(num_heads * room, np.float32)
    for i in range(len(rows)):
        item = items[i]
        context = contexts[item]
        first = max(0, context - window) if window > 0 else 0
        low, high = first // block_size, (context + block_size - 1) // block_size
        begin = first - low * block_size  # scores are counted from the first block's first slot
        widen_row(scaled, 0, stored_query, np.intp(rows[i]) * size, scale, size)
        for index in range(low, high):
            start = (np.intp(tables[item, index]) * num_layers + layer) * 2 * half
            following = (np.intp(tables[item, min(index + 1, high - 1)]) * num_layers + layer) * 2 * half
            # Whole vectors of slots, as far as the block goes: scores of those beyond the context are not read.
            count = min(block_size, (context - index * block_size + LANES - 1) // LANES * LANES)
            for head in range(num_heads):
                prefetch(flat_pool, following + head * share, share)
                place, key = head * room + (index - low) * block_size, start + head // group * head_dim
                dot_rows(scores, place, scaled, head * head_dim, flat_pool, key, stride, count, head_dim)
        for head in range(num_heads):
            softmax(scores[head * room + begin : head * room + context - low * block_size], softcap)
        sums[:] = np.float32(0.0)
        for index in range(low, high):
            skipped = max(0, first - index * block_size)
            start = (np.intp(tables[item, index]) * num_layers + layer) * 2 * half + half
            following = (np.intp(tables[item, min(index + 1, high - 1)]) * num_layers + layer) * 2 * half + half
            count = min(block_size, context - index * block_size) - skipped
            for head in range(num_heads):
                prefetch(flat_pool, following + head * share, share)
                weight = head * room + (index - low) * block_size + skipped
                value = start + skipped * stride + head // group * head_dim
                add_weighted_rows(
                    sums, head * head_dim, np.float32(1.0), scores, weight, flat_pool, value, stride, count, head_dim
                )  # fmt: skip
        narrow_row(stored_out, np.intp(rows[i]) * size, sums, 0, size)


@numba.njit(inline="always", fastmath=FASTMATH)
def softmax(scores: Any, softcap: Any) -> None:
    """In place."""
    if softcap > 0:
        for t in range(len(scores)):
            scores[t] = softcap * np.tanh(scores[t] / softcap)
    peak = highest(scores, 0, len(scores))
    total = np.float32(0.0)
    for t in range(len(scores)):
        scores[t] = exp_nonpositive(scores[t] - peak)
        total += scores[t]
    inverse = np.float32(1.0) / total
    for t in range(len(scores)):
        scores[t] *= inverse


@compiled(nogil=True, fastmath=FASTMATH)
def rms_norm(x: Any, weight: Any, eps: Any, out: Any) -> None:
    """out [T, H] = weight * x / sqrt(mean of x^2 + eps), rounded before and after the weight as `transformers` does."""
    width = x.shape[1]
    flat_x, flat_out = x.reshape(-1), out.reshape(-1)
    row = np.empty(width, np.float32)
    for token in range(x.shape[0]):
        widen_row(row, 0, flat_x, token * width, np.float32(1.0), width)
        normalize(row, 0, weight, eps, flat_out, token * width)


@numba.njit(inline="always", fastmath=FASTMATH)
def normalize(row: Any, start: int, weight: Any, eps: Any, out: Any, out_start: int) -> None:
    """row[start:] (float32, overwritten) by its root mean square and `weight` into out[out_start:]."""
    width = len(weight)
    total = np.float32(0.0)
    for d in range(width):
        total += row[start + d] * row[start + d]
    inverse = np.float32(1.0) / np.sqrt(total / np.float32(width) + eps)
    for d in range(width):
        row[start + d] *= inverse
    narrow_row(out, out_start, row, start, width)
    widen_row(row, start, out, out_start, np.float32(1.0), width)
    for d in range(width):
        row[start + d] *= weight[d]
    narrow_row(out, out_start, row, start, width)


@compiled(nogil=True, fastmath=FASTMATH)
def rotate_and_write(
    qkv: Any, positions: Any, cos: Any, sin: Any, query_weight: Any, key_weight: Any, eps: Any,
    query: Any, pool: Any, layer: int, blocks: Any, offsets: Any,
) -> None:  # fmt: skip
    """Rotary positions for queries and keys, `(x, y) -> (x cos - y sin, y cos + x sin)` of the halves of each head.

    qkv [T, (H + 2 Hkv) D] gives query [T, H, D] and the KV of slots (blocks[t], offsets[t]) in pool [B, L, 2, S, Hkv,
    D]. cos, sin [P, D / 2] float32, by position. Where `query_weight` and `key_weight` [D] are not empty, heads are
    normed with them first.
    """
    num_heads, head_dim = query.shape[1], query.shape[2]
    num_layers, block_size, num_kv_heads = pool.shape[1], pool.shape[3], pool.shape[4]
    flat_qkv, flat_query, flat_pool = qkv.reshape(-1), query.reshape(-1), pool.reshape(-1)
    flat_cos, flat_sin = cos.reshape(-1), sin.reshape(-1)
    slot_size = num_kv_heads * head_dim
    head = np.empty(head_dim, np.float32)
    for token in range(qkv.shape[0]):
        angle = positions[token] * (head_dim // 2)
        source = token * qkv.shape[1]
        slot = ((np.intp(blocks[token]) * num_layers + layer) * 2 * block_size + offsets[token]) * slot_size
        for i in range(num_heads):
            place = (token * num_heads + i) * head_dim
            rotate_head(flat_qkv, source, head, query_weight, eps, flat_cos, flat_sin, angle, flat_query, place)
            source += head_dim
        for i in range(num_kv_heads):
            place = slot + i * head_dim
            rotate_head(flat_qkv, source, head, key_weight, eps, flat_cos, flat_sin, angle, flat_pool, place)
            source += head_dim
        value = slot + block_size * slot_size
        for d in range(slot_size):
            flat_pool[value + d] = flat_qkv[source + d]


@numba.njit(inline="always", fastmath=FASTMATH)
def rotate_head(
    x: Any, start: int, head: Any, weight: Any, eps: Any, cos: Any, sin: Any, angle: int, out: Any, out_start: int
) -> None:
    """x[start:] by way of `head` [D], float32, into out[out_start:]."""
    width = len(head)
    half = width // 2
    widen_row(head, 0, x, start, np.float32(1.0), width)
    if len(weight):
        normalize(head, 0, weight, eps, out, out_start)
        widen_row(head, 0, out, out_start, np.float32(1.0), width)
    for d in range(half):
        a, b, c, s = head[d], head[half + d], cos[angle + d], sin[angle + d]
        head[d] = a * c - b * s
        head[half + d] = b * c + a * s
    narrow_row(out, out_start, head, 0, width)


@compiled(nogil=True)
def best_tokens(logits: Any, best: Any, peaks: Any) -> None:
    """best [R] = the first place of the highest of logits [R, V], peaks [R] = that, float32; NaN where there is one."""
    num_rows, size = logits.shape
    flat = logits.reshape(-1)
    part_peaks = np.empty((size + PART - 1) // PART, np.float32)
    wide = np.empty(PART, np.float32)
    for row in range(num_rows):
        for part in range(len(part_peaks)):
            start = part * PART
            part_peaks[part] = highest(flat, row * size + start, min(PART, size - start))
        peaks[row] = highest(part_peaks, 0, len(part_peaks))
        best[row] = 0
        for part in range(len(part_peaks)):
            if part_peaks[part] == peaks[row]:
                count = min(PART, size - part * PART)
                widen_row(wide, 0, flat, row * size + part * PART, np.float32(1.0), count)
                place = 0
                while wide[place] != peaks[row]:
                    place += 1
                best[row] = part * PART + place
                break
