"""Triton kernels of block attention: FlashAttention 2 (arXiv 2307.08691) over lists of tiles.

Each program owns one tile of resident rows, of one image and head, and loops over the rows of the
other side: queries are resident in `forward` and `backward_queries`, keys in `backward_keys` and
`backward_whole`. The row ranges come from a table made in Python (triton_launches.py), so that no
program loads rows outside its pattern. A table row is a `tiles.TileRange` and, for float16, the
chunks that the program reads, [first chunk, chunk stop), and the chunk that it writes.

`bounds` is (2, L) int32. Of queries: query l sees the keys [bounds[0, l], bounds[1, l]). Of keys:
key l is seen by the queries [bounds[0, l], bounds[1, l]).

Scores are in base 2: LOG2_SCALE is scale * log2(e), and lse is the base-2 logsumexp. delta is
rowsum(out * d_out). amax is a largest absolute value: v_amax and d_out_amax hold one for each of
num_chunks chunks of rows, from which `_d_scores_scale` follows.

Shapes: q, k, v, out and their gradients (B, L, H, D); lse and delta (B, H, L) float32; v_amax and
d_out_amax (B, H, num_chunks) float32; tables (num_tiles, 9) int32. Arguments named `aliased_...`
are the buffers of the outputs, in which earlier launches wrote other rows; kernels do not read
them. No kernel uses atomics: the same inputs give the same bits.
"""

import triton
import triton.language as tl

# Columns of a table.
_START, _STOP = tl.constexpr(0), tl.constexpr(1)
_STREAMED_START, _SPLIT = tl.constexpr(2), tl.constexpr(3)
_MASK_STOP, _STREAMED_STOP = tl.constexpr(4), tl.constexpr(5)
_FIRST_CHUNK, _CHUNK_STOP, _OWN_CHUNK = tl.constexpr(6), tl.constexpr(7), tl.constexpr(8)
_NUM_COLUMNS = tl.constexpr(9)

_NO_UPPER_BOUND = tl.constexpr(1 << 30)  # for resident rows past the end of the tile
# float16: |scaled d_scores| is at most twice this, below the largest finite float16, 65504.
_FLOAT16_LIMIT = tl.constexpr(16384.0)
# Scalars that differ between block lists; they share their compiled code.
_SCALARS = ("L", "num_tiles", "heads_per_group", "num_chunks")


@triton.jit
def _locate(num_tiles, heads_per_group, H: tl.constexpr):
    """Returns (table row, batch, head) of this program.

    `heads_per_group` heads at a time go through the whole table, the tiles with most work first.
    So tiles that read the same keys run at about the same time and find them in the L2 cache.
    """
    pid = tl.program_id(0)
    within = pid % (num_tiles * heads_per_group)
    pair = pid // (num_tiles * heads_per_group) * heads_per_group + within % heads_per_group
    return within // heads_per_group, pair // H, pair % H


@triton.jit
def _offsets(rows, H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    return rows[:, None] * (H * D) + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def _load(
    pointer, rows, stop, CHECK_ROWS: tl.constexpr,
    H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Loads (rows, BLOCK_D): zero from column D on and, if CHECK_ROWS, from row `stop` on."""
    pointers = pointer + _offsets(rows, H, D, BLOCK_D)
    columns = tl.arange(0, BLOCK_D)[None, :]
    if CHECK_ROWS:
        if BLOCK_D == D:
            return tl.load(pointers, mask=rows[:, None] < stop, other=0.0)
        else:
            return tl.load(pointers, mask=(rows[:, None] < stop) & (columns < D), other=0.0)
    elif BLOCK_D == D:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=columns < D, other=0.0)


@triton.jit
def _store(pointer, x, rows, stop, H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    mask = rows[:, None] < stop
    if BLOCK_D != D:
        mask = mask & (tl.arange(0, BLOCK_D)[None, :] < D)
    tl.store(pointer + _offsets(rows, H, D, BLOCK_D), x.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _amax(x):
    return tl.max(tl.max(tl.abs(x.to(tl.float32)), 1), 0)


@triton.jit
def _d_scores_scale(d_out_amax, v_amax, D: tl.constexpr):
    """The factor of d_scores before they are rounded to float16.

    With it, small gradients stay normal numbers and none overflows, since
    |d_out . v| <= D max|d_out| max|v| for every query and key of the program.
    """
    return _FLOAT16_LIMIT / (D * tl.maximum(d_out_amax * v_amax, 1e-30))


# Forward.


@triton.jit
def _forward_tile(
    q, acc, row_sum, row_max, k_base, v_base, keys, stop, lower, upper,
    CHECK_ROWS: tl.constexpr, MASKED: tl.constexpr, LOG2_SCALE: tl.constexpr,
    PRECISION: tl.constexpr, H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One key tile: the running output, sum and maximum of each query, updated (online softmax).

    CHECK_ROWS: keys may lie past the end. MASKED: the bounds of the queries decide as well.
    """
    k = _load(k_base, keys, stop, CHECK_ROWS, H, D, BLOCK_D)
    v = _load(v_base, keys, stop, CHECK_ROWS, H, D, BLOCK_D)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if MASKED:
        visible = (keys[None, :] >= lower[:, None]) & (keys[None, :] < upper[:, None])
        scores = tl.where(visible, scores * LOG2_SCALE, -float("inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        # A query that has seen no key yet: any finite number avoids -inf - -inf.
        finite_max = tl.where(new_max == -float("inf"), 0.0, new_max)
        weights = tl.exp2(scores - finite_max[:, None])
    elif CHECK_ROWS:
        scores = tl.where(keys[None, :] < stop, scores * LOG2_SCALE, -float("inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        finite_max = new_max
        weights = tl.exp2(scores - finite_max[:, None])
    else:
        # The compiler fuses the product with the scale into the subtraction, so the maximum is
        # taken of unscaled scores.
        if LOG2_SCALE >= 0:
            new_max = tl.maximum(row_max, tl.max(scores, 1) * LOG2_SCALE)
        else:
            new_max = tl.maximum(row_max, tl.min(scores, 1) * LOG2_SCALE)
        finite_max = new_max
        weights = tl.exp2(scores * LOG2_SCALE - finite_max[:, None])
    alpha = tl.exp2(row_max - finite_max)
    row_sum = row_sum * alpha + tl.sum(weights, 1)
    acc = acc * alpha[:, None]
    acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, row_sum, new_max


@triton.jit(do_not_specialize=_SCALARS)
def forward(
    q_ptr, k_ptr, v_ptr, bounds_ptr, table_ptr, aliased_out_ptr, aliased_lse_ptr,
    L, num_tiles, heads_per_group, out_ptr, lse_ptr,
    H: tl.constexpr, D: tl.constexpr, LOG2_SCALE: tl.constexpr,
    BLOCK_RESIDENT: tl.constexpr, BLOCK_STREAMED: tl.constexpr,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """out and lse of a tile of queries.

    Before the split, every query sees every key. From it on, the bounds of queries decide if
    MASKED; otherwise every query sees every key.
    """
    tile, b, h = _locate(num_tiles, heads_per_group, H)
    row_ptr = table_ptr + tile * _NUM_COLUMNS
    start = tl.load(row_ptr + _START)
    stop = tl.load(row_ptr + _STOP)
    key_start = tl.load(row_ptr + _STREAMED_START)
    split = tl.load(row_ptr + _SPLIT)
    key_stop = tl.load(row_ptr + _STREAMED_STOP)
    base = b.to(tl.int64) * (L * H * D) + h * D

    rows = start + tl.arange(0, BLOCK_RESIDENT)
    q = _load(q_ptr + base, rows, stop, True, H, D, BLOCK_D)
    lower = tl.load(bounds_ptr + rows, mask=rows < stop, other=0)
    upper = tl.load(bounds_ptr + L + rows, mask=rows < stop, other=_NO_UPPER_BOUND)
    acc = tl.zeros((BLOCK_RESIDENT, BLOCK_D), tl.float32)
    row_sum = tl.zeros((BLOCK_RESIDENT,), tl.float32)
    row_max = tl.full((BLOCK_RESIDENT,), -float("inf"), tl.float32)
    for key in range(key_start, split, BLOCK_STREAMED):
        keys = key + tl.arange(0, BLOCK_STREAMED)
        acc, row_sum, row_max = _forward_tile(
            q, acc, row_sum, row_max, k_ptr + base, v_ptr + base, keys, key_stop, lower, upper,
            False, False, LOG2_SCALE, PRECISION, H, D, BLOCK_D,
        )  # fmt: skip
    for key in range(split, key_stop, BLOCK_STREAMED):
        keys = key + tl.arange(0, BLOCK_STREAMED)
        acc, row_sum, row_max = _forward_tile(
            q, acc, row_sum, row_max, k_ptr + base, v_ptr + base, keys, key_stop, lower, upper,
            True, MASKED, LOG2_SCALE, PRECISION, H, D, BLOCK_D,
        )  # fmt: skip
    _store(out_ptr + base, acc / row_sum[:, None], rows, stop, H, D, BLOCK_D)
    lse_base = (b * H + h).to(tl.int64) * L
    tl.store(lse_ptr + lse_base + rows, row_max + tl.log2(row_sum), mask=rows < stop)


# Backward: what its kernels share.


@triton.jit(do_not_specialize=_SCALARS)
def prepare(
    v_ptr, table_ptr, L, num_tiles, heads_per_group, v_amax_ptr,
    H: tl.constexpr, D: tl.constexpr, BLOCK_RESIDENT: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """v_amax of a chunk of rows. Runs before the other backward kernels, for float16 only."""
    tile, b, h = _locate(num_tiles, heads_per_group, H)
    row_ptr = table_ptr + tile * _NUM_COLUMNS
    start = tl.load(row_ptr + _START)
    stop = tl.load(row_ptr + _STOP)
    base = b.to(tl.int64) * (L * H * D) + h * D
    rows = start + tl.arange(0, BLOCK_RESIDENT)
    v = _load(v_ptr + base, rows, stop, True, H, D, BLOCK_D)
    tl.store(v_amax_ptr + (b * H + h) * num_tiles + tile, _amax(v))


@triton.jit
def _amax_of_chunks(amax_ptr, pair, num_chunks, first, stop, BLOCK_CHUNKS: tl.constexpr):
    """The largest of the amax values stored for the chunks [first, stop)."""
    chunks = tl.arange(0, BLOCK_CHUNKS)
    inside = (chunks >= first) & (chunks < stop)
    return tl.max(tl.load(amax_ptr + pair * num_chunks + chunks, mask=inside, other=0.0), 0)


@triton.jit
def _load_columns(pointers, mask, N: tl.constexpr, LOAD_COPIES: tl.constexpr):
    """Loads (N,) numbers, one per column of a product; zero where not mask (None: loads all).

    In a plain load, each warp loads the numbers of all its columns, one by one, since the compiler
    takes a few loads to be cheap. If N * LOAD_COPIES is the number of threads, each thread loads
    one number, and they are exchanged through shared memory.
    """
    if LOAD_COPIES == 1:
        if mask is None:
            return tl.load(pointers)
        else:
            return tl.load(pointers, mask=mask, other=0.0)
    else:
        copies = tl.arange(0, LOAD_COPIES)[None, :] * 0
        if mask is None:
            x = tl.load(pointers[:, None] + copies)
        else:
            x = tl.load(pointers[:, None] + copies, mask=mask[:, None], other=0.0)
        if LOAD_COPIES == 4:
            x, _ = tl.split(tl.reshape(x, (N, 2, 2)))
        elif LOAD_COPIES == 8:
            x, _ = tl.split(tl.reshape(x, (N, 2, 2, 2)))
            x, _ = tl.split(x)
        x, _ = tl.split(x)
        return x


@triton.jit
def _d_scores(p, d_p, delta, d_scores_scale, RESCALED: tl.constexpr):
    """Gradients of the scaled scores, times d_scores_scale if RESCALED."""
    if RESCALED:
        return p * (d_p * d_scores_scale - delta * d_scores_scale)
    else:
        return p * (d_p - delta)


# Backward in one pass: a whole segment in one program.


@triton.jit
def _backward_whole_tile(
    k, v, d_k, d_v, q, d_out, lse_ptr, lower, upper, rows, stop, d_scores_scale,
    MASKED: tl.constexpr, RESCALED: tl.constexpr, LOG2_SCALE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_STREAMED: tl.constexpr, LOAD_COPIES: tl.constexpr,
):  # fmt: skip
    """One query tile: d_k and d_v updated, and d_q without SCALE / d_scores_scale."""
    inside = rows < stop
    scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)
    lse = _load_columns(lse_ptr + rows, inside, BLOCK_STREAMED, LOAD_COPIES)
    p = tl.exp2(scores * LOG2_SCALE - lse[None, :])
    if MASKED:
        visible = (rows[None, :] >= lower[:, None]) & (rows[None, :] < upper[:, None])
        p = tl.where(visible, p, 0.0)
    else:
        p = tl.where(upper[:, None] > 0, p, 0.0)
    d_v = tl.dot(p.to(q.dtype), d_out, d_v, input_precision=PRECISION)
    d_p = tl.dot(v, tl.trans(d_out), input_precision=PRECISION)
    # All keys of these queries are resident, so this is rowsum(out * d_out).
    delta = tl.sum(p * d_p, 0)
    d_scores = _d_scores(p, d_p, delta[None, :], d_scores_scale, RESCALED).to(q.dtype)
    d_k = tl.dot(d_scores, q, d_k, input_precision=PRECISION)
    # Transposed, the product has D rows, enough for the matrix units with any number of queries.
    d_q = tl.trans(tl.dot(tl.trans(k), d_scores, input_precision=PRECISION))
    return d_k, d_v, d_q


@triton.jit(do_not_specialize=_SCALARS)
def backward_whole(
    q_ptr, k_ptr, v_ptr, d_out_ptr, lse_ptr, bounds_ptr, table_ptr,
    aliased_d_q_ptr, aliased_d_k_ptr, aliased_d_v_ptr,
    L, num_tiles, heads_per_group, d_q_ptr, d_k_ptr, d_v_ptr,
    H: tl.constexpr, D: tl.constexpr, SCALE: tl.constexpr, LOG2_SCALE: tl.constexpr,
    BLOCK_RESIDENT: tl.constexpr, BLOCK_STREAMED: tl.constexpr,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, RESCALED: tl.constexpr,
    MASKED: tl.constexpr, LOAD_COPIES: tl.constexpr,
):  # fmt: skip
    """d_q, d_k and d_v of a segment that fits in BLOCK_RESIDENT rows (diagonal pattern).

    The keys stay on the chip while the queries stream past them, so every input is read once and
    every output written once; the forward output is not needed. Queries past the end load as
    zeros, and so do their d_out and all gradients. The bounds are those of keys.
    """
    tile, b, h = _locate(num_tiles, heads_per_group, H)
    row_ptr = table_ptr + tile * _NUM_COLUMNS
    start = tl.load(row_ptr + _START)
    stop = tl.load(row_ptr + _STOP)
    base = b.to(tl.int64) * (L * H * D) + h * D
    lse_base = lse_ptr + (b * H + h).to(tl.int64) * L
    keys = start + tl.arange(0, BLOCK_RESIDENT)
    lower = tl.load(bounds_ptr + keys, mask=keys < stop, other=0)
    upper = tl.load(bounds_ptr + L + keys, mask=keys < stop, other=0)
    k = _load(k_ptr + base, keys, stop, True, H, D, BLOCK_D)
    v = _load(v_ptr + base, keys, stop, True, H, D, BLOCK_D)
    d_k = tl.zeros((BLOCK_RESIDENT, BLOCK_D), tl.float32)
    d_v = tl.zeros((BLOCK_RESIDENT, BLOCK_D), tl.float32)
    d_scores_scale = 1.0
    if BLOCK_STREAMED >= BLOCK_RESIDENT:  # one query tile
        rows = start + tl.arange(0, BLOCK_STREAMED)
        q = _load(q_ptr + base, rows, stop, True, H, D, BLOCK_D)
        d_out = _load(d_out_ptr + base, rows, stop, True, H, D, BLOCK_D)
        if RESCALED:
            d_scores_scale = _d_scores_scale(_amax(d_out), _amax(v), D)
        d_k, d_v, d_q = _backward_whole_tile(
            k, v, d_k, d_v, q, d_out, lse_base, lower, upper, rows, stop, d_scores_scale,
            MASKED, RESCALED, LOG2_SCALE, PRECISION, BLOCK_STREAMED, LOAD_COPIES,
        )  # fmt: skip
        _store(d_q_ptr + base, d_q * (SCALE / d_scores_scale), rows, stop, H, D, BLOCK_D)
    else:
        if RESCALED:
            # Loads d_out of all tiles at once; the loop below then finds it in the L2 cache.
            d_out_amax = _amax(_load(d_out_ptr + base, keys, stop, True, H, D, BLOCK_D))
            d_scores_scale = _d_scores_scale(d_out_amax, _amax(v), D)
        for query in range(start, stop, BLOCK_STREAMED):
            rows = query + tl.arange(0, BLOCK_STREAMED)
            q = _load(q_ptr + base, rows, stop, True, H, D, BLOCK_D)
            d_out = _load(d_out_ptr + base, rows, stop, True, H, D, BLOCK_D)
            d_k, d_v, d_q = _backward_whole_tile(
                k, v, d_k, d_v, q, d_out, lse_base, lower, upper, rows, stop, d_scores_scale,
                MASKED, RESCALED, LOG2_SCALE, PRECISION, BLOCK_STREAMED, LOAD_COPIES,
            )  # fmt: skip
            _store(d_q_ptr + base, d_q * (SCALE / d_scores_scale), rows, stop, H, D, BLOCK_D)
    _store(d_k_ptr + base, d_k * (SCALE / d_scores_scale), keys, stop, H, D, BLOCK_D)
    _store(d_v_ptr + base, d_v, keys, stop, H, D, BLOCK_D)


# Backward of longer segments, in two kernels.


@triton.jit
def _backward_queries_tile(
    q, d_out, d_q, lse, delta, k_base, v_base, keys, stop, lower, upper, d_scores_scale,
    CHECK_ROWS: tl.constexpr, MASKED: tl.constexpr, LOG2_SCALE: tl.constexpr,
    PRECISION: tl.constexpr, RESCALED: tl.constexpr,
    H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One key tile for a tile of queries: d_q updated."""
    # Keys past the end load as zeros, so they add nothing to d_q whatever their p.
    k = _load(k_base, keys, stop, CHECK_ROWS, H, D, BLOCK_D)
    v = _load(v_base, keys, stop, CHECK_ROWS, H, D, BLOCK_D)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    d_p = tl.dot(d_out, tl.trans(v), input_precision=PRECISION)
    p = tl.exp2(scores * LOG2_SCALE - lse[:, None])
    if MASKED:
        visible = (keys[None, :] >= lower[:, None]) & (keys[None, :] < upper[:, None])
        p = tl.where(visible, p, 0.0)
    d_scores = _d_scores(p, d_p, delta[:, None], d_scores_scale, RESCALED)
    return tl.dot(d_scores.to(k.dtype), k, d_q, input_precision=PRECISION)


@triton.jit(do_not_specialize=_SCALARS)
def backward_queries(
    q_ptr, k_ptr, v_ptr, out_ptr, d_out_ptr, lse_ptr, v_amax_ptr, bounds_ptr, table_ptr,
    aliased_d_q_ptr, L, num_tiles, heads_per_group, num_chunks, d_q_ptr, delta_ptr, d_out_amax_ptr,
    H: tl.constexpr, D: tl.constexpr, SCALE: tl.constexpr, LOG2_SCALE: tl.constexpr,
    BLOCK_RESIDENT: tl.constexpr, BLOCK_STREAMED: tl.constexpr,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, RESCALED: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
):  # fmt: skip
    """d_q and delta of a tile of queries and, if RESCALED, its d_out_amax.

    Before the split and from mask_stop on, every query sees every key; between them, the bounds of
    queries decide.
    """
    tile, b, h = _locate(num_tiles, heads_per_group, H)
    row_ptr = table_ptr + tile * _NUM_COLUMNS
    start = tl.load(row_ptr + _START)
    stop = tl.load(row_ptr + _STOP)
    key_start = tl.load(row_ptr + _STREAMED_START)
    split = tl.load(row_ptr + _SPLIT)
    mask_stop = tl.load(row_ptr + _MASK_STOP)
    key_stop = tl.load(row_ptr + _STREAMED_STOP)
    base = b.to(tl.int64) * (L * H * D) + h * D
    pair = (b * H + h).to(tl.int64)
    rows = start + tl.arange(0, BLOCK_RESIDENT)
    inside = rows < stop
    q = _load(q_ptr + base, rows, stop, True, H, D, BLOCK_D)
    d_out = _load(d_out_ptr + base, rows, stop, True, H, D, BLOCK_D)
    lse = tl.load(lse_ptr + pair * L + rows, mask=inside, other=0.0)
    lower = tl.load(bounds_ptr + rows, mask=inside, other=0)
    upper = tl.load(bounds_ptr + L + rows, mask=inside, other=0)
    out = _load(out_ptr + base, rows, stop, True, H, D, BLOCK_D)
    delta = tl.sum(out.to(tl.float32) * d_out.to(tl.float32), 1)
    tl.store(delta_ptr + pair * L + rows, delta, mask=inside)
    d_q = tl.zeros((BLOCK_RESIDENT, BLOCK_D), tl.float32)
    d_scores_scale = 1.0
    if RESCALED:
        first = tl.load(row_ptr + _FIRST_CHUNK)
        chunk_stop = tl.load(row_ptr + _CHUNK_STOP)
        d_out_amax = _amax(d_out)
        tl.store(d_out_amax_ptr + pair * num_chunks + tl.load(row_ptr + _OWN_CHUNK), d_out_amax)
        v_amax = _amax_of_chunks(v_amax_ptr, pair, num_chunks, first, chunk_stop, BLOCK_CHUNKS)
        d_scores_scale = _d_scores_scale(d_out_amax, v_amax, D)
    # Masked tiles first: their bounds need no registers afterwards.
    for key in range(split, mask_stop, BLOCK_STREAMED):
        keys = key + tl.arange(0, BLOCK_STREAMED)
        d_q = _backward_queries_tile(
            q, d_out, d_q, lse, delta, k_ptr + base, v_ptr + base, keys, key_stop,
            lower, upper, d_scores_scale,
            True, True, LOG2_SCALE, PRECISION, RESCALED, H, D, BLOCK_D,
        )  # fmt: skip
    for key in range(key_start, split, BLOCK_STREAMED):
        keys = key + tl.arange(0, BLOCK_STREAMED)
        d_q = _backward_queries_tile(
            q, d_out, d_q, lse, delta, k_ptr + base, v_ptr + base, keys, key_stop,
            lower, upper, d_scores_scale,
            False, False, LOG2_SCALE, PRECISION, RESCALED, H, D, BLOCK_D,
        )  # fmt: skip
    for key in tl.range(mask_stop, key_stop, BLOCK_STREAMED, num_stages=1):
        keys = key + tl.arange(0, BLOCK_STREAMED)
        d_q = _backward_queries_tile(
            q, d_out, d_q, lse, delta, k_ptr + base, v_ptr + base, keys, key_stop,
            lower, upper, d_scores_scale,
            True, False, LOG2_SCALE, PRECISION, RESCALED, H, D, BLOCK_D,
        )  # fmt: skip
    _store(d_q_ptr + base, d_q * (SCALE / d_scores_scale), rows, stop, H, D, BLOCK_D)


@triton.jit
def _backward_keys_tile(
    k, v, d_k, d_v, q_base, d_out_base, lse_base, delta_base, rows, stop, lower, upper,
    d_scores_scale,
    MASKED: tl.constexpr, LOG2_SCALE: tl.constexpr, PRECISION: tl.constexpr,
    RESCALED: tl.constexpr, H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_STREAMED: tl.constexpr, LOAD_COPIES: tl.constexpr,
):  # fmt: skip
    """One query tile for a tile of keys: d_k and d_v updated.

    MASKED: the bounds of the keys decide, and queries may lie past the end; these load as zeros and
    add nothing.
    """
    inside = (rows < stop) if MASKED else None
    q = _load(q_base, rows, stop, MASKED, H, D, BLOCK_D)
    d_out = _load(d_out_base, rows, stop, MASKED, H, D, BLOCK_D)
    scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)
    d_p = tl.dot(v, tl.trans(d_out), input_precision=PRECISION)
    # Loaded where they are used: a value per column costs many registers.
    lse = _load_columns(lse_base + rows, inside, BLOCK_STREAMED, LOAD_COPIES)
    p = tl.exp2(scores * LOG2_SCALE - lse[None, :])
    if MASKED:
        visible = (rows[None, :] >= lower[:, None]) & (rows[None, :] < upper[:, None])
        p = tl.where(visible, p, 0.0)
    delta = _load_columns(delta_base + rows, inside, BLOCK_STREAMED, LOAD_COPIES)
    d_scores = _d_scores(p, d_p, delta[None, :], d_scores_scale, RESCALED)
    d_v = tl.dot(p.to(q.dtype), d_out, d_v, input_precision=PRECISION)
    d_k = tl.dot(d_scores.to(q.dtype), q, d_k, input_precision=PRECISION)
    return d_k, d_v


@triton.jit(do_not_specialize=_SCALARS)
def backward_keys(
    q_ptr, k_ptr, v_ptr, d_out_ptr, lse_ptr, delta_ptr, d_out_amax_ptr, bounds_ptr, table_ptr,
    aliased_d_k_ptr, aliased_d_v_ptr, L, num_tiles, heads_per_group, num_chunks, d_k_ptr, d_v_ptr,
    H: tl.constexpr, D: tl.constexpr, SCALE: tl.constexpr, LOG2_SCALE: tl.constexpr,
    BLOCK_RESIDENT: tl.constexpr, BLOCK_STREAMED: tl.constexpr,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, RESCALED: tl.constexpr,
    LOAD_COPIES: tl.constexpr, BLOCK_CHUNKS: tl.constexpr,
):  # fmt: skip
    """d_k and d_v of a tile of keys.

    Before the split, the bounds of keys decide. From it on, every query sees every key, and every
    tile of queries is full. Keys past the end of the tile load as zeros and affect only rows that
    are not stored.
    """
    tile, b, h = _locate(num_tiles, heads_per_group, H)
    row_ptr = table_ptr + tile * _NUM_COLUMNS
    start = tl.load(row_ptr + _START)
    stop = tl.load(row_ptr + _STOP)
    query_start = tl.load(row_ptr + _STREAMED_START)
    split = tl.load(row_ptr + _SPLIT)
    query_stop = tl.load(row_ptr + _STREAMED_STOP)
    base = b.to(tl.int64) * (L * H * D) + h * D
    pair = (b * H + h).to(tl.int64)
    keys = start + tl.arange(0, BLOCK_RESIDENT)
    k = _load(k_ptr + base, keys, stop, True, H, D, BLOCK_D)
    v = _load(v_ptr + base, keys, stop, True, H, D, BLOCK_D)
    lower = tl.load(bounds_ptr + keys, mask=keys < stop, other=0)
    upper = tl.load(bounds_ptr + L + keys, mask=keys < stop, other=0)
    d_k = tl.zeros((BLOCK_RESIDENT, BLOCK_D), tl.float32)
    d_v = tl.zeros((BLOCK_RESIDENT, BLOCK_D), tl.float32)
    d_scores_scale = 1.0
    if RESCALED:
        first = tl.load(row_ptr + _FIRST_CHUNK)
        chunk_stop = tl.load(row_ptr + _CHUNK_STOP)
        d_out_amax = _amax_of_chunks(
            d_out_amax_ptr, pair, num_chunks, first, chunk_stop, BLOCK_CHUNKS
        )
        d_scores_scale = _d_scores_scale(d_out_amax, _amax(v), D)
    for query in range(query_start, split, BLOCK_STREAMED):
        rows = query + tl.arange(0, BLOCK_STREAMED)
        d_k, d_v = _backward_keys_tile(
            k, v, d_k, d_v, q_ptr + base, d_out_ptr + base, lse_ptr + pair * L,
            delta_ptr + pair * L, rows, split, lower, upper, d_scores_scale,
            True, LOG2_SCALE, PRECISION, RESCALED, H, D, BLOCK_D, BLOCK_STREAMED, LOAD_COPIES,
        )  # fmt: skip
    for query in range(split, query_stop, BLOCK_STREAMED):
        rows = query + tl.arange(0, BLOCK_STREAMED)
        d_k, d_v = _backward_keys_tile(
            k, v, d_k, d_v, q_ptr + base, d_out_ptr + base, lse_ptr + pair * L,
            delta_ptr + pair * L, rows, query_stop, lower, upper, d_scores_scale,
            False, LOG2_SCALE, PRECISION, RESCALED, H, D, BLOCK_D, BLOCK_STREAMED, LOAD_COPIES,
        )  # fmt: skip
    _store(d_k_ptr + base, d_k * (SCALE / d_scores_scale), keys, stop, H, D, BLOCK_D)
    _store(d_v_ptr + base, d_v, keys, stop, H, D, BLOCK_D)
