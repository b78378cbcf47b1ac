"""The Triton kernels of fused_attention.py; to be imported where Triton is.

A head of D channels is MAIN channels, a power of two, and a rest in a tile of TAIL, if any. Every
length and window is known when a kernel is compiled, so that its loops have fixed numbers of turns.
"""

import triton
import triton.language as tl


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
    """A block of QUERIES of one head; in each of TURNS, a block of KEYS. scale: to base 2."""
    pair = tl.program_id(0).to(tl.int64)
    sample, head = pair // heads, pair % heads
    width = heads * D
    q = qkv + sample * TOKENS * 3 * width + head * D
    k, v = q + width, q + 2 * width
    begin = tl.program_id(1) * QUERIES
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
        if LEFT < TOKENS or RIGHT < TOKENS or TOKENS % KEYS:
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
def attention_backward(
    qkv, out, sums, grad, dqkv, heads, scale, plain_scale,
    TOKENS: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, TURNS: tl.constexpr,
):  # fmt: skip
    """One head, a block of KEYS after the other; for each, TURNS blocks of QUERIES."""
    pair = tl.program_id(0).to(tl.int64)
    sample, head = pair // heads, pair % heads
    width = heads * D
    inputs = sample * TOKENS * 3 * width + head * D
    outputs = sample * TOKENS * width + head * D
    q, k, v = qkv + inputs, qkv + inputs + width, qkv + inputs + 2 * width
    dq, dk, dv = dqkv + inputs, dqkv + inputs + width, dqkv + inputs + 2 * width
    o, do = out + outputs, grad + outputs
    half = qkv.dtype.element_ty
    begun = 0  # queries whose gradients hold what earlier keys gave
    for block in range((TOKENS + KEYS - 1) // KEYS):
        column = block * KEYS + tl.arange(0, KEYS)
        k_main = load(k, column, 3 * width, TOKENS, D, 0, MAIN)
        v_main = load(v, column, 3 * width, TOKENS, D, 0, MAIN)
        dk_main = tl.zeros((KEYS, MAIN), tl.float32)
        dv_main = tl.zeros((KEYS, MAIN), tl.float32)
        if TAIL:
            k_tail = load(k, column, 3 * width, TOKENS, D, MAIN, TAIL)
            v_tail = load(v, column, 3 * width, TOKENS, D, MAIN, TAIL)
            dk_tail = tl.zeros((KEYS, TAIL), tl.float32)
            dv_tail = tl.zeros((KEYS, TAIL), tl.float32)
        first = tl.maximum(block * KEYS - RIGHT, 0) // QUERIES * QUERIES
        for turn in range(TURNS):
            row = first + turn * QUERIES + tl.arange(0, QUERIES)
            q_main = load(q, row, 3 * width, TOKENS, D, 0, MAIN)
            do_main = load(do, row, width, TOKENS, D, 0, MAIN)
            o_main = load(o, row, width, TOKENS, D, 0, MAIN)
            delta = tl.sum(o_main.to(tl.float32) * do_main.to(tl.float32), 1)
            s = tl.dot(k_main, tl.trans(q_main))  # keys x queries
            dp = tl.dot(v_main, tl.trans(do_main))
            if TAIL:
                q_tail = load(q, row, 3 * width, TOKENS, D, MAIN, TAIL)
                do_tail = load(do, row, width, TOKENS, D, MAIN, TAIL)
                o_tail = load(o, row, width, TOKENS, D, MAIN, TAIL)
                delta += tl.sum(o_tail.to(tl.float32) * do_tail.to(tl.float32), 1)
                s = tl.dot(k_tail, tl.trans(q_tail), s)
                dp = tl.dot(v_tail, tl.trans(do_tail), dp)
            # past the last query p is 0 here; past the last key what it is multiplied with is
            log_sum = tl.load(sums + pair * TOKENS + row, mask=row < TOKENS, other=float("inf"))
            p = tl.exp2(s * scale - log_sum[None, :])
            if LEFT < TOKENS or RIGHT < TOKENS:
                offset = column[:, None] - row[None, :]
                p = tl.where((offset >= -LEFT) & (offset <= RIGHT), p, 0.0)
            ds = (p * (dp - delta[None, :])).to(half)
            p = p.to(half)
            dv_main = tl.dot(p, do_main, dv_main)
            dk_main = tl.dot(ds, q_main, dk_main)
            there = tl.where(row < begun, row, TOKENS)
            dq_main = tl.dot(tl.trans(ds), k_main) * plain_scale
            dq_main += load(dq, there, 3 * width, TOKENS, D, 0, MAIN).to(tl.float32)
            store(dq, row, 3 * width, dq_main, TOKENS, D, 0, MAIN)
            if TAIL:
                dv_tail = tl.dot(p, do_tail, dv_tail)
                dk_tail = tl.dot(ds, q_tail, dk_tail)
                dq_tail = tl.dot(tl.trans(ds), k_tail) * plain_scale
                dq_tail += load(dq, there, 3 * width, TOKENS, D, MAIN, TAIL).to(tl.float32)
                store(dq, row, 3 * width, dq_tail, TOKENS, D, MAIN, TAIL)
        store(dk, column, 3 * width, dk_main * plain_scale, TOKENS, D, 0, MAIN)
        store(dv, column, 3 * width, dv_main, TOKENS, D, 0, MAIN)
        if TAIL:
            store(dk, column, 3 * width, dk_tail * plain_scale, TOKENS, D, MAIN, TAIL)
            store(dv, column, 3 * width, dv_tail, TOKENS, D, MAIN, TAIL)
        begun = first + TURNS * QUERIES
        tl.debug_barrier()  # other threads read the queries' gradients again
