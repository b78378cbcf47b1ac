"""The Triton kernels of fused_attention.py; to be imported where Triton is.

A head of D channels is MAIN channels, a power of two, and a rest in a tile of TAIL, if any. Every
length and window is known when a kernel is compiled, so that its loops have a fixed number of
TURNS. Programs of one head are neighbours: they run at the same time and find its rows in the
cache. Scales are those of exponents to base 2.
"""

import triton
import triton.language as tl


@triton.jit
def place(heads, TOKENS: tl.constexpr, BLOCK: tl.constexpr):
    """A program's sample and head, as one number and apart, and its first token."""
    blocks = tl.cdiv(TOKENS, BLOCK)
    pair = (tl.program_id(0) // blocks).to(tl.int64)
    return pair, pair // heads, pair % heads, tl.program_id(0) % blocks * BLOCK


@triton.jit
def load(
    base, rows, row_width,
    TOKENS: tl.constexpr, D: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Rows of a head, its channels from FIRST on; 0 past the ends."""
    column = FIRST + tl.arange(0, WIDTH)
    at = base + rows[:, None] * row_width + column[None, :]
    return tl.load(at, mask=(rows[:, None] < TOKENS) & (column[None, :] < D), other=0.0)


@triton.jit
def store(
    base, rows, row_width, value,
    TOKENS: tl.constexpr, D: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    column = FIRST + tl.arange(0, WIDTH)
    at = base + rows[:, None] * row_width + column[None, :]
    inside = (rows[:, None] < TOKENS) & (column[None, :] < D)
    tl.store(at, value.to(base.dtype.element_ty), mask=inside)


@triton.jit
def attention(
    qkv, out, sums, heads, scale,
    TOKENS: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, TURNS: tl.constexpr,
):  # fmt: skip
    """What a block of queries of one head gets, and the logarithms of their sums."""
    pair, sample, head, begin = place(heads, TOKENS, QUERIES)
    width = heads * D
    q = qkv + sample * TOKENS * 3 * width + head * D
    k, v = q + width, q + 2 * width
    row = begin + tl.arange(0, QUERIES)
    q_main = load(q, row, 3 * width, TOKENS, D, 0, MAIN)
    sum_main = tl.zeros((QUERIES, MAIN), tl.float32)
    if TAIL:
        q_tail = load(q, row, 3 * width, TOKENS, D, MAIN, TAIL)
        sum_tail = tl.zeros((QUERIES, TAIL), tl.float32)
    top = tl.full((QUERIES,), -1e30, tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    first = tl.maximum(begin - LEFT, 0) // KEYS * KEYS
    for turn in range(TURNS):
        column = first + turn * KEYS + tl.arange(0, KEYS)
        s = tl.dot(q_main, tl.trans(load(k, column, 3 * width, TOKENS, D, 0, MAIN)))
        if TAIL:
            k_tail = load(k, column, 3 * width, TOKENS, D, MAIN, TAIL)
            s = tl.dot(q_tail, tl.trans(k_tail), s)
        s *= scale
        if (LEFT < TOKENS or RIGHT < TOKENS) or TOKENS % KEYS:
            offset = column[None, :] - row[:, None]
            seen = (offset >= -LEFT) & (offset <= RIGHT) & (column[None, :] < TOKENS)
            # a row of which nothing was seen yet adds up nonsense, which is scaled to 0 later
            s = tl.where(seen, s, -1e30)
        new_top = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - new_top[:, None])
        shrunk = tl.exp2(top - new_top)
        total = total * shrunk + tl.sum(p, 1)
        top = new_top
        p = p.to(qkv.dtype.element_ty)
        v_main = load(v, column, 3 * width, TOKENS, D, 0, MAIN)
        sum_main = tl.dot(p, v_main, sum_main * shrunk[:, None])
        if TAIL:
            v_tail = load(v, column, 3 * width, TOKENS, D, MAIN, TAIL)
            sum_tail = tl.dot(p, v_tail, sum_tail * shrunk[:, None])
    o = out + sample * TOKENS * width + head * D
    store(o, row, width, sum_main / total[:, None], TOKENS, D, 0, MAIN)
    if TAIL:
        store(o, row, width, sum_tail / total[:, None], TOKENS, D, MAIN, TAIL)
    tl.store(sums + pair * TOKENS + row, top + tl.log2(total), mask=row < TOKENS)


@triton.jit
def backward_queries(
    qkv, out, sums, grad, dqkv, shares, heads, scale, plain_scale,
    TOKENS: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, TURNS: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of queries of one head; and for `backward_keys` the products of what
    they got and its gradient, of which all their keys bear a share."""
    pair, sample, head, begin = place(heads, TOKENS, QUERIES)
    width = heads * D
    inputs = sample * TOKENS * 3 * width + head * D
    outputs = sample * TOKENS * width + head * D
    q, k, v = qkv + inputs, qkv + inputs + width, qkv + inputs + 2 * width
    o, do = out + outputs, grad + outputs
    row = begin + tl.arange(0, QUERIES)
    q_main = load(q, row, 3 * width, TOKENS, D, 0, MAIN)
    do_main = load(do, row, width, TOKENS, D, 0, MAIN)
    o_main = load(o, row, width, TOKENS, D, 0, MAIN)
    share = tl.sum(o_main.to(tl.float32) * do_main.to(tl.float32), 1)
    dq_main = tl.zeros((QUERIES, MAIN), tl.float32)
    if TAIL:
        q_tail = load(q, row, 3 * width, TOKENS, D, MAIN, TAIL)
        do_tail = load(do, row, width, TOKENS, D, MAIN, TAIL)
        o_tail = load(o, row, width, TOKENS, D, MAIN, TAIL)
        share += tl.sum(o_tail.to(tl.float32) * do_tail.to(tl.float32), 1)
        dq_tail = tl.zeros((QUERIES, TAIL), tl.float32)
    tl.store(shares + pair * TOKENS + row, share, mask=row < TOKENS)
    log_sum = tl.load(sums + pair * TOKENS + row, mask=row < TOKENS, other=float("inf"))
    first = tl.maximum(begin - LEFT, 0) // KEYS * KEYS
    for turn in range(TURNS):
        column = first + turn * KEYS + tl.arange(0, KEYS)
        k_main = load(k, column, 3 * width, TOKENS, D, 0, MAIN)
        v_main = load(v, column, 3 * width, TOKENS, D, 0, MAIN)
        s = tl.dot(q_main, tl.trans(k_main))
        dp = tl.dot(do_main, tl.trans(v_main))
        if TAIL:
            k_tail = load(k, column, 3 * width, TOKENS, D, MAIN, TAIL)
            v_tail = load(v, column, 3 * width, TOKENS, D, MAIN, TAIL)
            s = tl.dot(q_tail, tl.trans(k_tail), s)
            dp = tl.dot(do_tail, tl.trans(v_tail), dp)
        p = tl.exp2(s * scale - log_sum[:, None])
        if (LEFT < TOKENS or RIGHT < TOKENS) or TOKENS % KEYS:
            offset = column[None, :] - row[:, None]
            seen = (offset >= -LEFT) & (offset <= RIGHT) & (column[None, :] < TOKENS)
            p = tl.where(seen, p, 0.0)
        ds = (p * (dp - share[:, None])).to(qkv.dtype.element_ty)
        dq_main = tl.dot(ds, k_main, dq_main)
        if TAIL:
            dq_tail = tl.dot(ds, k_tail, dq_tail)
    dq = dqkv + inputs
    store(dq, row, 3 * width, dq_main * plain_scale, TOKENS, D, 0, MAIN)
    if TAIL:
        store(dq, row, 3 * width, dq_tail * plain_scale, TOKENS, D, MAIN, TAIL)


@triton.jit
def backward_keys(
    qkv, sums, grad, dqkv, shares, heads, scale, plain_scale,
    TOKENS: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, TURNS: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of keys of one head and of their values."""
    pair, sample, head, begin = place(heads, TOKENS, KEYS)
    width = heads * D
    inputs = sample * TOKENS * 3 * width + head * D
    q, k, v = qkv + inputs, qkv + inputs + width, qkv + inputs + 2 * width
    do = grad + sample * TOKENS * width + head * D
    column = begin + tl.arange(0, KEYS)
    k_main = load(k, column, 3 * width, TOKENS, D, 0, MAIN)
    v_main = load(v, column, 3 * width, TOKENS, D, 0, MAIN)
    dk_main = tl.zeros((KEYS, MAIN), tl.float32)
    dv_main = tl.zeros((KEYS, MAIN), tl.float32)
    if TAIL:
        k_tail = load(k, column, 3 * width, TOKENS, D, MAIN, TAIL)
        v_tail = load(v, column, 3 * width, TOKENS, D, MAIN, TAIL)
        dk_tail = tl.zeros((KEYS, TAIL), tl.float32)
        dv_tail = tl.zeros((KEYS, TAIL), tl.float32)
    first = tl.maximum(begin - RIGHT, 0) // QUERIES * QUERIES
    row = first + tl.arange(0, QUERIES)
    log_sum = tl.load(sums + pair * TOKENS + row, mask=row < TOKENS, other=float("inf"))
    share = tl.load(shares + pair * TOKENS + row, mask=row < TOKENS, other=0.0)
    for _ in range(TURNS):
        q_main = load(q, row, 3 * width, TOKENS, D, 0, MAIN)
        do_main = load(do, row, width, TOKENS, D, 0, MAIN)
        # the next rows' are on their way while these are used
        next_row = row + QUERIES
        there = next_row < TOKENS
        next_log_sum = tl.load(sums + pair * TOKENS + next_row, mask=there, other=float("inf"))
        next_share = tl.load(shares + pair * TOKENS + next_row, mask=there, other=0.0)
        s = tl.dot(k_main, tl.trans(q_main))  # keys x queries
        dp = tl.dot(v_main, tl.trans(do_main))
        if TAIL:
            q_tail = load(q, row, 3 * width, TOKENS, D, MAIN, TAIL)
            do_tail = load(do, row, width, TOKENS, D, MAIN, TAIL)
            s = tl.dot(k_tail, tl.trans(q_tail), s)
            dp = tl.dot(v_tail, tl.trans(do_tail), dp)
        p = tl.exp2(s * scale - log_sum[None, :])  # 0 past the last query
        if (LEFT < TOKENS or RIGHT < TOKENS) or TOKENS % KEYS:
            offset = column[:, None] - row[None, :]
            seen = (offset >= -LEFT) & (offset <= RIGHT) & (column[:, None] < TOKENS)
            p = tl.where(seen, p, 0.0)
        ds = (p * (dp - share[None, :])).to(qkv.dtype.element_ty)
        p = p.to(qkv.dtype.element_ty)
        dv_main = tl.dot(p, do_main, dv_main)
        dk_main = tl.dot(ds, q_main, dk_main)
        if TAIL:
            dv_tail = tl.dot(p, do_tail, dv_tail)
            dk_tail = tl.dot(ds, q_tail, dk_tail)
        row, log_sum, share = next_row, next_log_sum, next_share
    dk, dv = dqkv + inputs + width, dqkv + inputs + 2 * width
    store(dk, column, 3 * width, dk_main * plain_scale, TOKENS, D, 0, MAIN)
    store(dv, column, 3 * width, dv_main, TOKENS, D, 0, MAIN)
    if TAIL:
        store(dk, column, 3 * width, dk_tail * plain_scale, TOKENS, D, MAIN, TAIL)
        store(dv, column, 3 * width, dv_tail, TOKENS, D, MAIN, TAIL)
