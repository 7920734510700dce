"""Triton kernels of block attention, forward and backward (FlashAttention 2, arXiv 2307.08691, over lists of tiles).

Every program takes its row ranges from a table made in Python (triton_plan.py), so that it loads nothing outside its
pattern. A table row is 9 ints: own start, own stop, other start, other middle, other edge, other stop, first piece,
last piece stop, own piece. "Own" rows are queries in the forward and dq kernels and keys in the dk/dv kernel; "other"
rows are what the program loops over. The middle and the edge part them by what must be masked: each kernel says how.

`bounds` is (2, L) int32. Of queries: l sees the keys [bounds[0, l], bounds[1, l]). Of keys: l is seen by the queries
[bounds[0, l], bounds[1, l]). Inside a kernel all scores are in base 2: LOG2_SCALE is scale * log2(e), and the stored
logsumexp is a log2 too.

Arrays are q, k, v, out and their gradients (B, L, H, D); lse and delta (B, H, L) float32; top_v and top_d_out, the
largest |v| and |d_out| of each of P pieces of rows, (B, H, P) float32.
Arguments named `old_...` are the same buffers as the outputs, where an earlier launch wrote the other rows; they are
not read here. No kernel uses atomics: the same inputs give the same bits.
"""

import triton
import triton.language as tl

_COLUMNS = tl.constexpr(9)  # of the table
_EVERY_KEY = tl.constexpr(1 << 30)  # an upper bound on keys for rows that are no query
# float16: |scaled d_scores| is at most twice this, under float16's largest, 65504.
_HALF_RANGE = tl.constexpr(16384.0)
# Lists of other lengths need no other code.
_COUNTS = ("L", "n_tiles", "together", "n_pieces")


@triton.jit
def _locate(n_tiles, together, H: tl.constexpr):
    """(row of the table, batch, head): `together` heads at a time go through the whole table, heaviest tiles first.

    So the tiles that read the same keys run at about the same time, and find them in the L2 cache.
    """
    pid = tl.program_id(0)
    within = pid % (n_tiles * together)
    pair = pid // (n_tiles * together) * together + within % together
    return within // together, pair // H, pair % H


@triton.jit
def _offsets(rows, H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    return rows[:, None] * (H * D) + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def _load(
    pointer,
    rows,
    stop,
    CHECKED: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """(rows, BLOCK_D), zero where a row is not before stop (if CHECKED) or a column not before D."""
    pointers = pointer + _offsets(rows, H, D, BLOCK_D)
    columns = tl.arange(0, BLOCK_D)[None, :]
    if CHECKED:
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
def _largest(x):
    return tl.max(tl.max(tl.abs(x.to(tl.float32)), 1), 0)


@triton.jit
def _factor(top_d_out, top_v, D: tl.constexpr):
    """What to multiply d_scores with before they become float16: small gradients stay normal, none overflows.

    |d_out . v| <= D max|d_out| max|v|, for every query and key of the program.
    """
    return _HALF_RANGE / (D * tl.maximum(top_d_out * top_v, 1e-30))


@triton.jit
def _attend_tile(
    q, acc, total, top, k_base, v_base, keys, stop, lo, hi,
    CHECKED: tl.constexpr, MASKED: tl.constexpr, LOG2_SCALE: tl.constexpr, PRECISION: tl.constexpr,
    H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One key tile of the forward pass: the running output, sum and maximum of each query, updated.

    CHECKED: keys may lie behind the end. MASKED: the bounds decide as well.
    """
    k = _load(k_base, keys, stop, CHECKED, H, D, BLOCK_D)
    v = _load(v_base, keys, stop, CHECKED, H, D, BLOCK_D)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if MASKED:
        seen = (keys[None, :] >= lo[:, None]) & (keys[None, :] < hi[:, None])
        scores = tl.where(seen, scores * LOG2_SCALE, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        # A query that has seen no key yet: any finite number keeps -inf - -inf out.
        base = tl.where(new_top == -float("inf"), 0.0, new_top)
        weights = tl.exp2(scores - base[:, None])
    elif CHECKED:
        scores = tl.where(keys[None, :] < stop, scores * LOG2_SCALE, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        base = new_top
        weights = tl.exp2(scores - base[:, None])
    else:
        # The product with the scale is fused into the subtraction; so the maximum is taken of unscaled scores.
        if LOG2_SCALE >= 0:
            new_top = tl.maximum(top, tl.max(scores, 1) * LOG2_SCALE)
        else:
            new_top = tl.maximum(top, tl.min(scores, 1) * LOG2_SCALE)
        base = new_top
        weights = tl.exp2(scores * LOG2_SCALE - base[:, None])
    shrink = tl.exp2(top - base)
    total = total * shrink + tl.sum(weights, 1)
    acc = acc * shrink[:, None]
    acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, total, new_top


@triton.jit(do_not_specialize=_COUNTS)
def forward(
    q_ptr, k_ptr, v_ptr, bounds_ptr, table_ptr, old_out_ptr, old_lse_ptr, L, n_tiles, together,
    out_ptr, lse_ptr,
    H: tl.constexpr, D: tl.constexpr, LOG2_SCALE: tl.constexpr,
    BLOCK_OWN: tl.constexpr, BLOCK_OTHER: tl.constexpr,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """out and lse of a tile of queries. Before the middle every query sees every key; from it on the bounds of
    queries decide if MASKED, and every query sees every key if not."""
    tile, b, h = _locate(n_tiles, together, H)
    own_start = tl.load(table_ptr + tile * _COLUMNS)
    own_stop = tl.load(table_ptr + tile * _COLUMNS + 1)
    start = tl.load(table_ptr + tile * _COLUMNS + 2)
    middle = tl.load(table_ptr + tile * _COLUMNS + 3)
    stop = tl.load(table_ptr + tile * _COLUMNS + 5)
    base = b.to(tl.int64) * (L * H * D) + h * D

    rows = own_start + tl.arange(0, BLOCK_OWN)
    q = _load(q_ptr + base, rows, own_stop, True, H, D, BLOCK_D)
    lo = tl.load(bounds_ptr + rows, mask=rows < own_stop, other=0)
    hi = tl.load(bounds_ptr + L + rows, mask=rows < own_stop, other=_EVERY_KEY)
    acc = tl.zeros((BLOCK_OWN, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_OWN,), tl.float32)
    top = tl.full((BLOCK_OWN,), -float("inf"), tl.float32)
    for key in range(start, middle, BLOCK_OTHER):
        keys = key + tl.arange(0, BLOCK_OTHER)
        acc, total, top = _attend_tile(
            q, acc, total, top, k_ptr + base, v_ptr + base, keys, stop, lo, hi,
            False, False, LOG2_SCALE, PRECISION, H, D, BLOCK_D,
        )  # fmt: skip
    for key in range(middle, stop, BLOCK_OTHER):
        keys = key + tl.arange(0, BLOCK_OTHER)
        acc, total, top = _attend_tile(
            q, acc, total, top, k_ptr + base, v_ptr + base, keys, stop, lo, hi,
            True, MASKED, LOG2_SCALE, PRECISION, H, D, BLOCK_D,
        )  # fmt: skip
    _store(out_ptr + base, acc / total[:, None], rows, own_stop, H, D, BLOCK_D)
    lse_base = (b * H + h).to(tl.int64) * L
    tl.store(lse_ptr + lse_base + rows, top + tl.log2(total), mask=rows < own_stop)


@triton.jit(do_not_specialize=_COUNTS)
def prepare(
    v_ptr, table_ptr, L, n_tiles, together, top_v_ptr,
    H: tl.constexpr, D: tl.constexpr, BLOCK_OWN: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The largest |v| of a piece of rows."""
    tile, b, h = _locate(n_tiles, together, H)
    own_start = tl.load(table_ptr + tile * _COLUMNS)
    own_stop = tl.load(table_ptr + tile * _COLUMNS + 1)
    base = b.to(tl.int64) * (L * H * D) + h * D
    rows = own_start + tl.arange(0, BLOCK_OWN)
    v = _load(v_ptr + base, rows, own_stop, True, H, D, BLOCK_D)
    tl.store(top_v_ptr + (b * H + h) * n_tiles + tile, _largest(v))


@triton.jit
def _top_of_pieces(tops_ptr, pair, n_pieces, first, stop, BLOCK_PIECES: tl.constexpr):
    """The largest of the maxima stored for the pieces [first, stop)."""
    pieces = tl.arange(0, BLOCK_PIECES)
    inside = (pieces >= first) & (pieces < stop)
    return tl.max(tl.load(tops_ptr + pair * n_pieces + pieces, mask=inside, other=0.0), 0)


@triton.jit
def _load_columns(pointers, mask, N: tl.constexpr, SPREAD: tl.constexpr):
    """(N,) numbers, one for each column of a product, zero where not mask (None: all are loaded).

    Loaded plainly, each warp loads the numbers of all its columns, one by one, since the compiler takes few loads for
    cheap. Where N * SPREAD is the number of threads, each thread loads one and they meet in shared memory.
    """
    if SPREAD == 1:
        if mask is None:
            return tl.load(pointers)
        else:
            return tl.load(pointers, mask=mask, other=0.0)
    else:
        copies = tl.arange(0, SPREAD)[None, :] * 0
        if mask is None:
            x = tl.load(pointers[:, None] + copies)
        else:
            x = tl.load(pointers[:, None] + copies, mask=mask[:, None], other=0.0)
        if SPREAD == 4:
            x, _ = tl.split(tl.reshape(x, (N, 2, 2)))
        elif SPREAD == 8:
            x, _ = tl.split(tl.reshape(x, (N, 2, 2, 2)))
            x, _ = tl.split(x)
        x, _ = tl.split(x)
        return x


@triton.jit
def _d_scores(p, d_p, delta, factor, RANGED: tl.constexpr):
    """Gradients of the scaled scores, times factor if RANGED."""
    if RANGED:
        return p * (d_p * factor - delta * factor)
    else:
        return p * (d_p - delta)


@triton.jit
def _whole_tile(
    k, v, d_k, d_v, q, d_out, lse_ptr, lo, hi, rows, stop, factor,
    MASKED: tl.constexpr, RANGED: tl.constexpr, LOG2_SCALE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_OTHER: tl.constexpr, SPREAD: tl.constexpr,
):  # fmt: skip
    """One query tile of `backward_whole`: d_k and d_v updated, and d_q without its factors."""
    inside = rows < stop
    scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)
    lse = _load_columns(lse_ptr + rows, inside, BLOCK_OTHER, SPREAD)
    p = tl.exp2(scores * LOG2_SCALE - lse[None, :])
    if MASKED:
        p = tl.where((rows[None, :] >= lo[:, None]) & (rows[None, :] < hi[:, None]), p, 0.0)
    else:
        p = tl.where(hi[:, None] > 0, p, 0.0)
    d_v = tl.dot(p.to(q.dtype), d_out, d_v, input_precision=PRECISION)
    d_p = tl.dot(v, tl.trans(d_out), input_precision=PRECISION)
    # Every key of these queries is here, so this is rowsum(out * d_out).
    delta = tl.sum(p * d_p, 0)
    d_scores = _d_scores(p, d_p, delta[None, :], factor, RANGED).to(q.dtype)
    d_k = tl.dot(d_scores, q, d_k, input_precision=PRECISION)
    # Transposed, the product has a head dim of rows, as many as the matrix units want for any number of queries.
    d_q = tl.trans(tl.dot(tl.trans(k), d_scores, input_precision=PRECISION))
    return d_k, d_v, d_q


@triton.jit(do_not_specialize=_COUNTS)
def backward_whole(
    q_ptr, k_ptr, v_ptr, d_out_ptr, lse_ptr, bounds_ptr, table_ptr, old_dq_ptr, old_dk_ptr, old_dv_ptr,
    L, n_tiles, together, dq_ptr, dk_ptr, dv_ptr,
    H: tl.constexpr, D: tl.constexpr, SCALE: tl.constexpr, LOG2_SCALE: tl.constexpr,
    BLOCK_OWN: tl.constexpr, BLOCK_OTHER: tl.constexpr,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, RANGED: tl.constexpr, MASKED: tl.constexpr,
    SPREAD: tl.constexpr,
):  # fmt: skip
    """dq, dk and dv of a group of blocks that sees itself alone and fits in BLOCK_OWN rows (diagonal pattern).

    The keys stay on the chip while the queries pass by, so every input is read once and every output written once; the
    forward output is not needed. Queries behind the end load as zeros, and so do their d_out and all gradients.
    The bounds are those of keys.
    """
    tile, b, h = _locate(n_tiles, together, H)
    start = tl.load(table_ptr + tile * _COLUMNS)
    stop = tl.load(table_ptr + tile * _COLUMNS + 1)
    base = b.to(tl.int64) * (L * H * D) + h * D
    lse_base = lse_ptr + (b * H + h).to(tl.int64) * L
    keys = start + tl.arange(0, BLOCK_OWN)
    lo = tl.load(bounds_ptr + keys, mask=keys < stop, other=0)
    hi = tl.load(bounds_ptr + L + keys, mask=keys < stop, other=0)
    k = _load(k_ptr + base, keys, stop, True, H, D, BLOCK_D)
    v = _load(v_ptr + base, keys, stop, True, H, D, BLOCK_D)
    d_k = tl.zeros((BLOCK_OWN, BLOCK_D), tl.float32)
    d_v = tl.zeros((BLOCK_OWN, BLOCK_D), tl.float32)
    factor = 1.0
    if BLOCK_OTHER >= BLOCK_OWN:  # one query tile
        rows = start + tl.arange(0, BLOCK_OTHER)
        q = _load(q_ptr + base, rows, stop, True, H, D, BLOCK_D)
        d_out = _load(d_out_ptr + base, rows, stop, True, H, D, BLOCK_D)
        if RANGED:
            factor = _factor(_largest(d_out), _largest(v), D)
        d_k, d_v, d_q = _whole_tile(
            k, v, d_k, d_v, q, d_out, lse_base, lo, hi, rows, stop, factor,
            MASKED, RANGED, LOG2_SCALE, PRECISION, BLOCK_OTHER, SPREAD,
        )  # fmt: skip
        _store(dq_ptr + base, d_q * (SCALE / factor), rows, stop, H, D, BLOCK_D)
    else:
        if RANGED:
            # Of all tiles at once; the loop below then finds them in the L2 cache.
            factor = _factor(
                _largest(_load(d_out_ptr + base, keys, stop, True, H, D, BLOCK_D)), _largest(v), D
            )
        for query in range(start, stop, BLOCK_OTHER):
            rows = query + tl.arange(0, BLOCK_OTHER)
            q = _load(q_ptr + base, rows, stop, True, H, D, BLOCK_D)
            d_out = _load(d_out_ptr + base, rows, stop, True, H, D, BLOCK_D)
            d_k, d_v, d_q = _whole_tile(
                k, v, d_k, d_v, q, d_out, lse_base, lo, hi, rows, stop, factor,
                MASKED, RANGED, LOG2_SCALE, PRECISION, BLOCK_OTHER, SPREAD,
            )  # fmt: skip
            _store(dq_ptr + base, d_q * (SCALE / factor), rows, stop, H, D, BLOCK_D)
    _store(dk_ptr + base, d_k * (SCALE / factor), keys, stop, H, D, BLOCK_D)
    _store(dv_ptr + base, d_v, keys, stop, H, D, BLOCK_D)


@triton.jit
def _key_gradients_tile(
    k, v, d_k, d_v, q_base, d_out_base, lse_base, delta_base, rows, stop, lo, hi, factor,
    MASKED: tl.constexpr, LOG2_SCALE: tl.constexpr, PRECISION: tl.constexpr, RANGED: tl.constexpr,
    H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_OTHER: tl.constexpr, SPREAD: tl.constexpr,
):  # fmt: skip
    """One query tile for a tile of keys: d_k and d_v updated.

    MASKED: the bounds decide, and queries may lie behind the end; these load as zeros and add nothing.
    """
    inside = (rows < stop) if MASKED else None
    q = _load(q_base, rows, stop, MASKED, H, D, BLOCK_D)
    d_out = _load(d_out_base, rows, stop, MASKED, H, D, BLOCK_D)
    scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)
    d_p = tl.dot(v, tl.trans(d_out), input_precision=PRECISION)
    # Loaded where they are used: a value for each column costs many registers.
    lse = _load_columns(lse_base + rows, inside, BLOCK_OTHER, SPREAD)
    p = tl.exp2(scores * LOG2_SCALE - lse[None, :])
    if MASKED:
        p = tl.where((rows[None, :] >= lo[:, None]) & (rows[None, :] < hi[:, None]), p, 0.0)
    delta = _load_columns(delta_base + rows, inside, BLOCK_OTHER, SPREAD)
    d_scores = _d_scores(p, d_p, delta[None, :], factor, RANGED)
    d_v = tl.dot(p.to(q.dtype), d_out, d_v, input_precision=PRECISION)
    d_k = tl.dot(d_scores.to(q.dtype), q, d_k, input_precision=PRECISION)
    return d_k, d_v


@triton.jit(do_not_specialize=_COUNTS)
def backward_keys(
    q_ptr, k_ptr, v_ptr, d_out_ptr, lse_ptr, delta_ptr, top_d_out_ptr, bounds_ptr, table_ptr, old_dk_ptr, old_dv_ptr,
    L, n_tiles, together, n_pieces, dk_ptr, dv_ptr,
    H: tl.constexpr, D: tl.constexpr, SCALE: tl.constexpr, LOG2_SCALE: tl.constexpr,
    BLOCK_OWN: tl.constexpr, BLOCK_OTHER: tl.constexpr,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, RANGED: tl.constexpr,
    SPREAD: tl.constexpr, BLOCK_PIECES: tl.constexpr,
):  # fmt: skip
    """dk and dv of a tile of keys. Before the middle the bounds of keys decide; from it on every query sees every key,
    and every tile of queries is full.
    Keys behind the tile's end load as zeros and touch only rows that are not stored."""
    tile, b, h = _locate(n_tiles, together, H)
    own_start = tl.load(table_ptr + tile * _COLUMNS)
    own_stop = tl.load(table_ptr + tile * _COLUMNS + 1)
    start = tl.load(table_ptr + tile * _COLUMNS + 2)
    middle = tl.load(table_ptr + tile * _COLUMNS + 3)
    stop = tl.load(table_ptr + tile * _COLUMNS + 5)
    base = b.to(tl.int64) * (L * H * D) + h * D
    pair = (b * H + h).to(tl.int64)
    keys = own_start + tl.arange(0, BLOCK_OWN)
    k = _load(k_ptr + base, keys, own_stop, True, H, D, BLOCK_D)
    v = _load(v_ptr + base, keys, own_stop, True, H, D, BLOCK_D)
    lo = tl.load(bounds_ptr + keys, mask=keys < own_stop, other=0)
    hi = tl.load(bounds_ptr + L + keys, mask=keys < own_stop, other=0)
    d_k = tl.zeros((BLOCK_OWN, BLOCK_D), tl.float32)
    d_v = tl.zeros((BLOCK_OWN, BLOCK_D), tl.float32)
    factor = 1.0
    if RANGED:
        first = tl.load(table_ptr + tile * _COLUMNS + 6)
        last = tl.load(table_ptr + tile * _COLUMNS + 7)
        factor = _factor(
            _top_of_pieces(top_d_out_ptr, pair, n_pieces, first, last, BLOCK_PIECES), _largest(v), D
        )
    for query in range(start, middle, BLOCK_OTHER):
        rows = query + tl.arange(0, BLOCK_OTHER)
        d_k, d_v = _key_gradients_tile(
            k, v, d_k, d_v, q_ptr + base, d_out_ptr + base, lse_ptr + pair * L, delta_ptr + pair * L, rows, middle,
            lo, hi, factor, True, LOG2_SCALE, PRECISION, RANGED, H, D, BLOCK_D, BLOCK_OTHER, SPREAD,
        )  # fmt: skip
    for query in range(middle, stop, BLOCK_OTHER):
        rows = query + tl.arange(0, BLOCK_OTHER)
        d_k, d_v = _key_gradients_tile(
            k, v, d_k, d_v, q_ptr + base, d_out_ptr + base, lse_ptr + pair * L, delta_ptr + pair * L, rows, stop,
            lo, hi, factor, False, LOG2_SCALE, PRECISION, RANGED, H, D, BLOCK_D, BLOCK_OTHER, SPREAD,
        )  # fmt: skip
    _store(dk_ptr + base, d_k * (SCALE / factor), keys, own_stop, H, D, BLOCK_D)
    _store(dv_ptr + base, d_v, keys, own_stop, H, D, BLOCK_D)


@triton.jit
def _query_gradient_tile(
    q, d_out, d_q, lse, delta, k_base, v_base, keys, stop, lo, hi, factor,
    CHECKED: tl.constexpr, MASKED: tl.constexpr, LOG2_SCALE: tl.constexpr,
    PRECISION: tl.constexpr, RANGED: tl.constexpr,
    H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One key tile for a tile of queries: d_q updated."""
    # Keys behind the end load as zeros, so they add nothing to d_q whatever their p.
    k = _load(k_base, keys, stop, CHECKED, H, D, BLOCK_D)
    v = _load(v_base, keys, stop, CHECKED, H, D, BLOCK_D)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    d_p = tl.dot(d_out, tl.trans(v), input_precision=PRECISION)
    p = tl.exp2(scores * LOG2_SCALE - lse[:, None])
    if MASKED:
        p = tl.where((keys[None, :] >= lo[:, None]) & (keys[None, :] < hi[:, None]), p, 0.0)
    d_scores = _d_scores(p, d_p, delta[:, None], factor, RANGED)
    return tl.dot(d_scores.to(k.dtype), k, d_q, input_precision=PRECISION)


@triton.jit(do_not_specialize=_COUNTS)
def backward_queries(
    q_ptr, k_ptr, v_ptr, out_ptr, d_out_ptr, lse_ptr, top_v_ptr, bounds_ptr, table_ptr, old_dq_ptr,
    L, n_tiles, together, n_pieces, dq_ptr, delta_ptr, top_d_out_ptr,
    H: tl.constexpr, D: tl.constexpr, SCALE: tl.constexpr, LOG2_SCALE: tl.constexpr,
    BLOCK_OWN: tl.constexpr, BLOCK_OTHER: tl.constexpr,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, RANGED: tl.constexpr,
    BLOCK_PIECES: tl.constexpr,
):  # fmt: skip
    """dq of a tile of queries, delta = rowsum(out * d_out) and, if RANGED, the largest |d_out|. Before the middle and
    from the edge on, every query sees every key; between them the bounds of queries decide."""
    tile, b, h = _locate(n_tiles, together, H)
    own_start = tl.load(table_ptr + tile * _COLUMNS)
    own_stop = tl.load(table_ptr + tile * _COLUMNS + 1)
    start = tl.load(table_ptr + tile * _COLUMNS + 2)
    middle = tl.load(table_ptr + tile * _COLUMNS + 3)
    edge = tl.load(table_ptr + tile * _COLUMNS + 4)
    stop = tl.load(table_ptr + tile * _COLUMNS + 5)
    base = b.to(tl.int64) * (L * H * D) + h * D
    pair = (b * H + h).to(tl.int64)
    rows = own_start + tl.arange(0, BLOCK_OWN)
    inside = rows < own_stop
    q = _load(q_ptr + base, rows, own_stop, True, H, D, BLOCK_D)
    d_out = _load(d_out_ptr + base, rows, own_stop, True, H, D, BLOCK_D)
    lse = tl.load(lse_ptr + pair * L + rows, mask=inside, other=0.0)
    lo = tl.load(bounds_ptr + rows, mask=inside, other=0)
    hi = tl.load(bounds_ptr + L + rows, mask=inside, other=0)
    out = _load(out_ptr + base, rows, own_stop, True, H, D, BLOCK_D)
    delta = tl.sum(out.to(tl.float32) * d_out.to(tl.float32), 1)
    tl.store(delta_ptr + pair * L + rows, delta, mask=inside)
    d_q = tl.zeros((BLOCK_OWN, BLOCK_D), tl.float32)
    factor = 1.0
    if RANGED:
        first = tl.load(table_ptr + tile * _COLUMNS + 6)
        last = tl.load(table_ptr + tile * _COLUMNS + 7)
        top_d_out = _largest(d_out)
        tl.store(
            top_d_out_ptr + pair * n_pieces + tl.load(table_ptr + tile * _COLUMNS + 8), top_d_out
        )
        factor = _factor(
            top_d_out, _top_of_pieces(top_v_ptr, pair, n_pieces, first, last, BLOCK_PIECES), D
        )
    # Masked tiles first: their bounds need no registers afterwards.
    for key in range(middle, edge, BLOCK_OTHER):
        keys = key + tl.arange(0, BLOCK_OTHER)
        d_q = _query_gradient_tile(
            q, d_out, d_q, lse, delta, k_ptr + base, v_ptr + base, keys, stop, lo, hi, factor,
            True, True, LOG2_SCALE, PRECISION, RANGED, H, D, BLOCK_D,
        )  # fmt: skip
    for key in range(start, middle, BLOCK_OTHER):
        keys = key + tl.arange(0, BLOCK_OTHER)
        d_q = _query_gradient_tile(
            q, d_out, d_q, lse, delta, k_ptr + base, v_ptr + base, keys, stop, lo, hi, factor,
            False, False, LOG2_SCALE, PRECISION, RANGED, H, D, BLOCK_D,
        )  # fmt: skip
    for key in tl.range(edge, stop, BLOCK_OTHER, num_stages=1):
        keys = key + tl.arange(0, BLOCK_OTHER)
        d_q = _query_gradient_tile(
            q, d_out, d_q, lse, delta, k_ptr + base, v_ptr + base, keys, stop, lo, hi, factor,
            True, False, LOG2_SCALE, PRECISION, RANGED, H, D, BLOCK_D,
        )  # fmt: skip
    _store(dq_ptr + base, d_q * (SCALE / factor), rows, own_stop, H, D, BLOCK_D)
