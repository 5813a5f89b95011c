"""Products of bfloat16 matrices, for CPUs with AVX512-BF16, that read weights once however few rows there are.

bfloat16 comes as its bits in uint16. A matrix [N, K] is *packed* into panels of `COLUMNS` outputs, in each of them
pairs along K, so that one instruction multiplies 16 pairs with one pair of x: `[N / COLUMNS, K / 2, COLUMNS, 2]`, the
last panel padded with zeros. Sums are kept in float32 and rounded once, to the nearest, ties to even.
"""

from typing import Any

import llvmlite.binding  # type: ignore[import-untyped]
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types

from flowkv.model.jit import compiled
from flowkv.model.numba_kernels import FLOAT, LANES, declared, for_widths, intrinsic, row_pointer, stack_slot

VECTORS = 2  # of a panel
COLUMNS = VECTORS * LANES
ROWS = (8, 4, 2, 1)  # of x, whose sums are in registers beside each other; more of them spill
QUERY_ROWS = 16  # of a head, whose scores are held at once
ASKING_ROWS = 4  # from which on a panel takes so long that the next one is asked for meanwhile
BLOCK_ELEMENTS = 2**17  # of x, multiplied with all panels while they are in the second-level cache
LOWEST = -1e30
LOG2_E = 1.4426950408889634
EXP2_TAYLOR = (1.5403530e-4, 1.3333558e-3, 9.6181291e-3, 5.5504109e-2, 2.4022651e-1, 6.9314718e-1, 1.0)


class BFloat(ir.Type):  # type: ignore[misc]
    """LLVM's type, which llvmlite has no name for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BFloat)

    def __hash__(self) -> int:
        return hash(BFloat)


SHORT, WORD = ir.IntType(16), ir.IntType(32)
SUMS, WORDS, PAIRS = ir.VectorType(FLOAT, LANES), ir.VectorType(WORD, LANES), ir.VectorType(BFloat(), 2 * LANES)


def is_supported() -> bool:
    """Whether this machine has the instruction."""
    return bool(llvmlite.binding.get_host_cpu_features().get("avx512bf16", False))


def spread(builder: Any, value: Any) -> Any:
    """A float32, or an integer as one of 32 bits, in every lane."""
    kind = SUMS if value.type == FLOAT else WORDS
    value = value if value.type in (FLOAT, WORD) else builder.trunc(value, WORD)
    single = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(WORD, 0))
    return builder.shuffle_vector(single, ir.Constant(kind, ir.Undefined), ir.Constant(WORDS, [0] * LANES))


def dot_product(builder: Any) -> Any:
    """(sums, pairs, pairs) -> sums with the two products of each lane added."""
    return declared(builder, "llvm.x86.avx512bf16.dpbf16ps.512", SUMS, [SUMS, PAIRS, PAIRS])


def load_pairs(builder: Any, words: Any, index: Any) -> Any:
    """16 pairs from words[index] on."""
    place = builder.bitcast(builder.gep(words, [index]), WORDS.as_pointer())
    return builder.bitcast(builder.load(place, align=4), PAIRS)


def spread_pair(builder: Any, words: Any, index: Any) -> Any:
    """The pair words[index] in every lane."""
    word = builder.load(builder.gep(words, [index]), align=2)
    return builder.bitcast(spread(builder, word), PAIRS)


def rounding(builder: Any) -> Any:
    """float32 -> bfloat16, to the nearest, ties to even; a NaN stays one."""
    return declared(builder, "llvm.x86.avx512bf16.cvtneps2bf16.512", ir.VectorType(BFloat(), LANES), [SUMS])


def first_lanes(builder: Any, count: Any) -> Any:
    """A mask of lanes below `count`."""
    return builder.icmp_signed("<", ir.Constant(WORDS, list(range(LANES))), spread(builder, count))


def store_masked(builder: Any, value: Any, place: Any, mask: Any, name: str, alignment: int) -> None:
    target = builder.bitcast(place, value.type.as_pointer())
    arguments = [value.type, target.type, WORD, mask.type]
    store = declared(builder, f"llvm.masked.store.v{LANES}{name}.p0", ir.VoidType(), arguments)
    builder.call(store, [value, target, ir.Constant(WORD, alignment), mask])


def load_wide(builder: Any, place: Any, mask: Any) -> Any:
    """float32 of bfloat16 at `place`, 0 where masked."""
    short = ir.VectorType(SHORT, LANES)
    source = builder.bitcast(place, short.as_pointer())
    function = declared(builder, f"llvm.masked.load.v{LANES}i16.p0", short, [source.type, WORD, mask.type, short])
    stored = builder.call(function, [source, ir.Constant(WORD, 2), mask, ir.Constant(short, None)])
    return builder.bitcast(builder.shl(builder.zext(stored, WORDS), ir.Constant(WORDS, [16] * LANES)), SUMS)


def constant(value: float) -> Any:
    return ir.Constant(SUMS, [value] * LANES)


def exp_of(builder: Any, x: Any) -> Any:
    """e^x within 3e-7 of itself between 2^-127 and 2^127, a NaN for a NaN: 2^(n + f), with the Taylor polynomial of 2^f
    for |f| <= 1/2."""
    scaled = builder.fmul(x, constant(LOG2_E))
    for order, bound in (("<", -127.0), (">", 127.0)):
        scaled = builder.select(builder.fcmp_ordered(order, scaled, constant(bound)), constant(bound), scaled)
    floor = declared(builder, f"llvm.floor.v{LANES}f32", SUMS, [SUMS])
    whole = builder.call(floor, [builder.fadd(scaled, constant(0.5))])
    f = builder.fsub(scaled, whole)
    p = constant(EXP2_TAYLOR[0])
    for coefficient in EXP2_TAYLOR[1:]:
        p = builder.fadd(builder.fmul(p, f, flags=("contract",)), constant(coefficient), flags=("contract",))
    exponent = builder.add(builder.fptosi(whole, WORDS), ir.Constant(WORDS, [127] * LANES))
    return builder.fmul(p, builder.bitcast(builder.shl(exponent, ir.Constant(WORDS, [23] * LANES)), SUMS))


def silu_times(builder: Any, gate: Any, up: Any) -> Any:
    grown = exp_of(builder, builder.fsub(constant(-0.0), gate))
    return builder.fmul(builder.fdiv(gate, builder.fadd(constant(1.0), grown)), up)


def ask_for(builder: Any, words: Any) -> None:
    """Have the line at `words`, which may be any address, brought into the second-level cache."""
    place = builder.bitcast(words, ir.IntType(8).as_pointer())
    prefetch = declared(builder, "llvm.prefetch.p0", ir.VoidType(), [place.type, WORD, WORD, WORD])
    builder.call(prefetch, [place, *(ir.Constant(WORD, flag) for flag in (0, 2, 1))])  # read, second level, data


def panel_product(kind: str) -> Any:
    """An intrinsic that multiplies `num_rows` rows of x with one panel, starting from `bias`.

    `kind` says what is stored at out[out_offset + r * out_stride + c] for c < num_columns: the sums ("bfloat16",
    "float32"), the sums plus what is at the same place of `other` ("add"), or silu of the first half of the sums times
    the second ("gate").
    """

    @intrinsic
    def product(
        typing_context: Any, out: Any, out_offset: Any, out_stride: Any, num_columns: Any, other: Any, bias: Any,
        bias_offset: Any, x: Any, x_offset: Any, x_stride: Any, panel: Any, panel_offset: Any, num_pairs: Any,
        num_rows: Any,
    ) -> Any:  # fmt: skip
        integer = types.intp
        signature = types.none(
            out, integer, integer, integer, other, bias, integer, x, integer, integer, panel, integer, integer, integer
        )
        return signature, lambda context, builder, _, args: emit_product(kind, context, builder, signature, args)

    return product


def emit_product(kind: str, context: Any, builder: Any, signature: Any, args: Any) -> Any:
    out, out_offset, out_stride, num_columns, other, bias, bias_offset, x, x_offset, x_stride, panel, panel_offset = (
        args[:12]
    )
    num_pairs, num_rows = args[12:]
    element = FLOAT if kind == "float32" else SHORT
    target = row_pointer(context, builder, signature.args[0], out, out_offset, element)
    added = row_pointer(context, builder, signature.args[4], other, out_offset, SHORT) if kind == "add" else None
    start = row_pointer(context, builder, signature.args[5], bias, bias_offset, FLOAT)
    left = row_pointer(context, builder, signature.args[7], x, x_offset, SHORT)
    right = builder.bitcast(
        row_pointer(context, builder, signature.args[10], panel, panel_offset, SHORT), WORD.as_pointer()
    )
    dot, round_off = dot_product(builder), rounding(builder)
    index = out_offset.type
    next_panel = builder.gep(right, [builder.mul(num_pairs, ir.Constant(index, COLUMNS))])
    lanes = [ir.Constant(index, v * LANES) for v in range(VECTORS)]
    masks = [first_lanes(builder, builder.sub(num_columns, lane)) for lane in lanes]
    firsts = [
        builder.load(builder.bitcast(builder.gep(start, [lane]), SUMS.as_pointer()), align=4) for lane in lanes
    ]  # fmt: skip
    sums = [[stack_slot(builder, SUMS) for _ in range(VECTORS)] for _ in range(ROWS[0])]

    def finish(row: Any, found: list[Any]) -> None:
        place = builder.mul(row, out_stride)
        if kind == "gate":
            found = [silu_times(builder, *found)]
        for lane, mask, value in zip(lanes, masks, found, strict=False):
            at = builder.add(place, lane)
            if added is not None:
                value = builder.fadd(value, load_wide(builder, builder.gep(added, [at]), mask))
            if kind != "float32":
                value = builder.call(round_off, [value])
            name, alignment = ("f32", 4) if kind == "float32" else ("bf16", 2)
            store_masked(builder, value, builder.gep(target, [at]), mask, name, alignment)

    def some_rows(row: Any, num: int) -> None:
        rows = [builder.add(row, ir.Constant(index, i)) for i in range(num)]
        words = [
            builder.bitcast(builder.gep(left, [builder.mul(one, x_stride)]), WORD.as_pointer()) for one in rows
        ]  # fmt: skip
        for places in sums[:num]:
            for place, first in zip(places, firsts, strict=True):
                builder.store(first, place)
        with cgutils.for_range(builder, num_pairs) as pair:
            base = builder.mul(pair.index, ir.Constant(index, COLUMNS))
            for lane in lanes if num >= ASKING_ROWS else []:
                ask_for(builder, builder.gep(next_panel, [builder.add(base, lane)]))
            weights = [load_pairs(builder, right, builder.add(base, lane)) for lane in lanes]
            for row_words, places in zip(words, sums, strict=False):
                a = spread_pair(builder, row_words, pair.index)
                for b, place in zip(weights, places, strict=True):
                    builder.store(builder.call(dot, [builder.load(place), a, b]), place)
        for one, places in zip(rows, sums, strict=False):
            finish(one, [builder.load(place) for place in places])

    for_widths(builder, num_rows, ROWS, some_rows)
    return context.get_dummy_value()


plain_product, float_product, add_product, gate_product = map(panel_product, ("bfloat16", "float32", "add", "gate"))


@compiled(nogil=True)
def linear(x: Any, panels: Any, bias: Any, other: Any, out: Any) -> None:
    """out [M, N] = bias + x [M, K] times the packed matrix, plus `other` [M, N] unless that is None.

    `bias` is float32, as long as the panels are wide. `out` may be `other`.
    """
    width, num_outputs = x.shape[1], out.shape[1]
    block_rows = max(ROWS[0], BLOCK_ELEMENTS // width)
    flat_x, flat_panels, flat_out = x.reshape(-1), panels.reshape(-1), out.reshape(-1)
    for row in range(0, x.shape[0], block_rows):
        num_rows = min(block_rows, x.shape[0] - row)
        for panel in range(panels.shape[0]):
            first = panel * COLUMNS
            if other is None:
                plain_product(
                    flat_out, row * num_outputs + first, num_outputs, num_outputs - first, flat_out, bias, first,
                    flat_x, row * width, width, flat_panels, first * width, width // 2, num_rows,
                )  # fmt: skip
            else:
                add_product(
                    flat_out, row * num_outputs + first, num_outputs, num_outputs - first, other.reshape(-1), bias,
                    first, flat_x, row * width, width, flat_panels, first * width, width // 2, num_rows,
                )  # fmt: skip


@compiled(nogil=True)
def gated_linear(x: Any, panels: Any, bias: Any, out: Any) -> None:
    """out [M, N] = silu(gate) * up, for panels that hold `LANES` outputs of the gate and the same of up."""
    width, num_outputs = x.shape[1], out.shape[1]
    block_rows = max(ROWS[0], BLOCK_ELEMENTS // width)
    flat_x, flat_panels, flat_out = x.reshape(-1), panels.reshape(-1), out.reshape(-1)
    for row in range(0, x.shape[0], block_rows):
        num_rows = min(block_rows, x.shape[0] - row)
        for panel in range(panels.shape[0]):
            first = panel * LANES
            gate_product(
                flat_out, row * num_outputs + first, num_outputs, num_outputs - first, flat_out, bias,
                panel * COLUMNS, flat_x, row * width, width, flat_panels, panel * COLUMNS * width, width // 2, num_rows,
            )  # fmt: skip


def folded(builder: Any, vector: Any, combine: Any) -> Any:
    """All lanes combined, in every lane."""
    width = LANES
    while width > 1:
        width //= 2
        order = [lane ^ width for lane in range(LANES)]
        turned = builder.shuffle_vector(vector, ir.Constant(SUMS, ir.Undefined), ir.Constant(WORDS, order))
        vector = combine(vector, turned)
    return vector


@intrinsic
def softmax_row(
    typing_context: Any, scores: Any, offset: Any, low: Any, high: Any, width: Any, scale: Any, out: Any
) -> Any:  # fmt: skip
    """out[offset + i] (bfloat16) = softmax of scores[offset + i] * scale over low <= i < high, and 0 elsewhere below
    `width`, a multiple of `LANES`. `scores` is overwritten."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source = row_pointer(context, builder, scores, args[0], args[1], FLOAT)
        target = row_pointer(context, builder, out, args[6], args[1], SHORT)
        factor, low_lanes, high_lanes = (spread(builder, value) for value in (args[5], args[2], args[3]))
        total, peak = stack_slot(builder, SUMS), stack_slot(builder, SUMS)
        index = args[1].type
        num_vectors = builder.udiv(args[4], ir.Constant(index, LANES))

        def place(at: Any) -> Any:
            where = builder.gep(source, [builder.mul(at, ir.Constant(index, LANES))])
            return builder.bitcast(where, SUMS.as_pointer())

        def mask(at: Any) -> Any:
            first = spread(builder, builder.mul(at, ir.Constant(index, LANES)))
            lanes = builder.add(first, ir.Constant(WORDS, list(range(LANES))))
            inside = builder.icmp_signed(">=", lanes, low_lanes)
            return builder.and_(inside, builder.icmp_signed("<", lanes, high_lanes))

        def higher(a: Any, b: Any) -> Any:
            return builder.select(builder.fcmp_ordered(">", a, b), a, b)

        builder.store(constant(LOWEST), peak)
        with cgutils.for_range(builder, num_vectors) as loop:
            scaled = builder.fmul(builder.load(place(loop.index), align=4), factor)
            seen = builder.select(mask(loop.index), scaled, constant(LOWEST))
            builder.store(seen, place(loop.index), align=4)
            builder.store(higher(seen, builder.load(peak)), peak)
        highest = folded(builder, builder.load(peak), higher)
        builder.store(constant(0.0), total)
        with cgutils.for_range(builder, num_vectors) as loop:
            grown = exp_of(builder, builder.fsub(builder.load(place(loop.index), align=4), highest))
            grown = builder.select(mask(loop.index), grown, constant(0.0))
            builder.store(grown, place(loop.index), align=4)
            builder.store(builder.fadd(builder.load(total), grown), total)
        inverse = builder.fdiv(constant(1.0), folded(builder, builder.load(total), builder.fadd))
        round_off = rounding(builder)
        with cgutils.for_range(builder, num_vectors) as loop:
            share = builder.call(round_off, [builder.fmul(builder.load(place(loop.index), align=4), inverse)])
            where = builder.gep(target, [builder.mul(loop.index, ir.Constant(index, LANES))])
            builder.store(share, builder.bitcast(where, share.type.as_pointer()), align=2)
        return context.get_dummy_value()

    integer = types.intp
    return types.none(scores, integer, integer, integer, integer, types.float32, out), code


@compiled(nogil=True)
def attend_chunk(
    query: Any, pool: Any, layer: int, table: Any, start: int, first: int, scale: Any, window: int, softcap: Any,
    out: Any,
) -> None:  # fmt: skip
    """Attention of query [t, H, D], whose first token is at position `start`, to the KV of one sequence, into `out`.

    KV of positions from `first` on is read from pool [B, L, 2, S, Hkv, D] through the block table, packed head by head,
    and multiplied `QUERY_ROWS` rows at a time. `window` and `softcap` 0 mean none.
    """
    num_tokens, num_heads, head_dim = query.shape
    num_kv_heads = pool.shape[4]
    group, row_stride = num_heads // num_kv_heads, num_heads * head_dim
    num_keys = start + num_tokens - first
    padded = (num_keys + COLUMNS - 1) // COLUMNS * COLUMNS
    keys = np.zeros(padded * head_dim, np.uint16)
    num_panels = (head_dim + COLUMNS - 1) // COLUMNS
    values = np.zeros(num_panels * COLUMNS * padded, np.uint16)
    zeros = np.zeros(COLUMNS, np.float32)
    scores, shares = np.empty(QUERY_ROWS * padded, np.float32), np.empty(QUERY_ROWS * padded, np.uint16)
    flat_query, flat_out = query.reshape(-1), out.reshape(-1)
    for head in range(num_heads):
        if head % group == 0:
            pack_kv(pool, layer, table, first, num_keys, head // group, keys, values, padded)
        for row in range(0, num_tokens, QUERY_ROWS):
            num_rows = min(QUERY_ROWS, num_tokens - row)
            before = start + row - first  # keys before the first row's own
            low = max(0, before + 1 - window) // COLUMNS if window > 0 else 0
            high = (before + num_rows + COLUMNS - 1) // COLUMNS
            width, place = (high - low) * COLUMNS, row * row_stride + head * head_dim
            for panel in range(low, high):
                float_product(
                    scores, (panel - low) * COLUMNS, width, COLUMNS, scores, zeros, 0, flat_query, place, row_stride,
                    keys, panel * COLUMNS * head_dim, head_dim // 2, num_rows,
                )  # fmt: skip
            if softcap > 0:
                for i in range(num_rows * width):
                    scores[i] = softcap * np.tanh(scores[i] * scale / softcap)
            for i in range(num_rows):
                stop = before + i + 1
                begin = max(0, stop - window) if window > 0 else 0
                offset = low * COLUMNS
                factor = scale if softcap == 0 else np.float32(1.0)
                softmax_row(scores, i * width, begin - offset, stop - offset, width, factor, shares)
            for panel in range(num_panels):
                column = panel * COLUMNS
                plain_product(
                    flat_out, place + column, row_stride, head_dim - column, flat_out, zeros, 0, shares, 0, width,
                    values, column * padded + low * COLUMNS * COLUMNS, width // 2, num_rows,
                )  # fmt: skip


@compiled(nogil=True)
def pack_kv(
    pool: Any, layer: int, table: Any, first: int, num_keys: int, head: int, keys: Any, values: Any, padded: int
) -> None:
    """One head's keys as [padded / COLUMNS, D / 2, COLUMNS, 2], its values as [D / COLUMNS, padded / 2, COLUMNS, 2]."""
    block_size, num_kv_heads, head_dim = pool.shape[3], pool.shape[4], pool.shape[5]
    flat = pool.reshape(-1)
    pairs, packed = flat.view(np.uint32), keys.view(np.uint32)
    half = block_size * num_kv_heads * head_dim  # from a slot's K to its V
    for i in range(num_keys):
        block, offset = table[(first + i) // block_size], (first + i) % block_size
        slot = (np.intp(block) * pool.shape[1] + layer) * 2 * half + (offset * num_kv_heads + head) * head_dim
        panel, column = i // COLUMNS * (head_dim // 2), i % COLUMNS
        for d in range(head_dim // 2):
            packed[(panel + d) * COLUMNS + column] = pairs[slot // 2 + d]
        for d in range(head_dim):
            place = (d // COLUMNS * padded // 2 + i // 2) * COLUMNS + d % COLUMNS
            values[2 * place + i % 2] = flat[slot + half + d]
