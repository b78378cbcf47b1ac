"""The Triton kernels of fused_scan.py; to be imported where Triton is.

Tokens are cut into chunks of CHUNK. Where two chunks meet is a link: there the state stands that
the second begins with, and its gradient. Inside of a chunk targets (rows) take from sources
(columns) what the decay between them leaves: `sums` are running sums of the logarithms of the
decays, to base 2, of each chunk alone. They and the step sizes lie as [B, chunks, heads, CHUNK],
without effect past the last token.

Operands of products have the precision of the inputs, sums are float32. Heads of P channels lie in
tiles of WIDTH. How many turns a loop takes is known only when it runs: see fused_scan.py.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def share(groups, parts, per_group, each):
    """A program's group of heads, its part of that, and the heads from first to before last; what
    is left of its number."""
    part = tl.program_id(0) % parts
    group = tl.program_id(0) // parts % groups
    first = group * per_group + part * each
    last = tl.minimum(first + each, (group + 1) * per_group)
    return group, part, first, last, (tl.program_id(0) // (parts * groups)).to(tl.int64)


@triton.jit
def load_rows(base, t, stride, inside, WIDTH: tl.constexpr):
    """Rows t of `base`, as wide as WIDTH; 0 outside."""
    at = base + t[:, None] * stride + tl.arange(0, WIDTH)[None, :]
    return tl.load(at, mask=inside[:, None], other=0.0)


@triton.jit
def load_head(base, t, stride, inside, P: tl.constexpr, WIDTH: tl.constexpr):
    column = tl.arange(0, WIDTH)
    seen = inside[:, None] if WIDTH == P else inside[:, None] & (column < P)[None, :]
    return tl.load(base + t[:, None] * stride + column[None, :], mask=seen, other=0.0)


@triton.jit
def store_head(base, t, stride, inside, value, P: tl.constexpr, WIDTH: tl.constexpr):
    column = tl.arange(0, WIDTH)
    seen = inside[:, None] if WIDTH == P else inside[:, None] & (column < P)[None, :]
    at = base + t[:, None] * stride + column[None, :]
    tl.store(at, value.to(base.dtype.element_ty), mask=seen)


@triton.jit
def load_state(base, place, there, N: tl.constexpr, WIDTH: tl.constexpr):
    at = base + place * (N * WIDTH) + tl.arange(0, N)[:, None] * WIDTH
    return tl.load(at + tl.arange(0, WIDTH)[None, :], mask=there, other=0.0)


@triton.jit
def prepare(
    dt, steps, sizes, sums, tokens, chunks, heads, blocks,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Step sizes and running sums of the logarithms of the decays, from [B, T, heads] to how the
    other kernels read them."""
    place = (tl.program_id(0) // blocks).to(tl.int64)
    t = tl.arange(0, CHUNK)
    row = place % chunks * CHUNK + t
    head = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    at = (place // chunks * tokens + row)[:, None] * heads + head[None, :]
    inside = (row < tokens)[:, None] & (head < heads)[None, :]
    size = tl.load(dt + at, mask=inside, other=0.0)
    total = tl.cumsum(tl.load(steps + at, mask=inside, other=0.0), 0) * LOG2_E
    to = (place * heads + head)[:, None] * CHUNK + t[None, :]
    tl.store(sizes + to, tl.trans(size), mask=(head < heads)[:, None])
    tl.store(sums + to, tl.trans(total), mask=(head < heads)[:, None])


@triton.jit
def close(
    notes, ddt, dsteps, dskips, tokens, chunks, heads, blocks,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The reverse of `prepare`, from what `gradients` notes; and a chunk's gradient of the skip."""
    place = (tl.program_id(0) // blocks).to(tl.int64)
    t = tl.arange(0, CHUNK)
    row = place % chunks * CHUNK + t
    head = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    at = ((place * heads + head) * CHUNK * 4)[:, None] + tl.arange(0, CHUNK * 4)[None, :]
    noted = tl.load(notes + at, mask=(head < heads)[:, None], other=0.0)
    some, others = tl.split(tl.reshape(noted, (BLOCK, CHUNK, 2, 2)))
    total, size = tl.split(some)
    leaving, straight = tl.split(others)
    total = tl.cumsum(total, 1, reverse=True) + tl.sum(leaving, 1)[:, None]
    tl.store(dskips + place * heads + head, tl.sum(straight, 1), mask=head < heads)
    to = (place // chunks * tokens + row)[:, None] * heads + head[None, :]
    inside = (row < tokens)[:, None] & (head < heads)[None, :]
    tl.store(ddt + to, tl.trans(size), mask=inside)
    tl.store(dsteps + to, tl.trans(total), mask=inside)


@triton.jit(do_not_specialize=["tokens", "chunks", "parts"])
def walk(
    values, value_width, keys, key_width, sizes, sums, states,
    tokens, chunks, heads, groups, parts,
    P: tl.constexpr, WIDTH: tl.constexpr, N: tl.constexpr,
    CHUNK: tl.constexpr, HEADS: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """States at all links of HEADS neighbouring heads of a sample, from the inputs (values) and B
    (keys) of the chunks before; or, BACK, their gradients, from the outputs' and C of the chunks
    behind."""
    per_group = heads // groups
    group, _, first, last, sample = share(groups, parts, per_group, HEADS)
    t = tl.arange(0, CHUNK)
    head = first + tl.arange(0, HEADS)
    n = tl.arange(0, N)
    column = tl.arange(0, HEADS * WIDTH)
    own = first + column // WIDTH  # head of a column
    if WIDTH == P:
        channel = first * P + column
        real = channel < last * P
    else:
        channel = own * P + column % WIDTH
        real = (own < last) & (column % WIDTH < P)
    to = (own * (N * WIDTH) + column % WIDTH)[None, :] + n[:, None] * WIDTH
    state = tl.zeros((N, HEADS * WIDTH), tl.float32)
    for turn in range(chunks - 1):
        link = chunks - 2 - turn if BACK else turn
        chunk = link + 1 if BACK else link
        inside = t < tokens - chunk * CHUNK
        row = sample * tokens + chunk * CHUNK
        here = (sample * chunks + chunk) * heads * CHUNK
        seen = (head < last)[None, :]
        at = head[None, :] * CHUNK + t[:, None]
        last_sum = tl.load(sums + here + head * CHUNK + CHUNK - 1, mask=head < last, other=0.0)
        some = tl.load(sums + here + at, mask=seen, other=0.0)
        if BACK:
            weight = tl.exp2(some)
        else:
            size = tl.load(sizes + here + at, mask=seen, other=0.0)
            weight = size * tl.exp2(last_sum[None, :] - some)
        key = load_rows(keys + row * key_width + group * N, t, key_width, inside, N)
        value = tl.load(
            values + row * value_width + t[:, None] * value_width + channel[None, :],
            mask=inside[:, None] & real[None, :], other=0.0,
        )  # fmt: skip
        value = tl.reshape(value, (CHUNK, HEADS, WIDTH)) * weight[:, :, None]
        value = tl.reshape(value, (CHUNK, HEADS * WIDTH)).to(keys.dtype.element_ty)
        kept = tl.broadcast_to(tl.exp2(last_sum)[:, None], (HEADS, WIDTH))
        state *= tl.reshape(kept, (HEADS * WIDTH,))[None, :]
        state = tl.dot(tl.trans(key), value, state)
        place = (sample * (chunks - 1) + link) * heads * (N * WIDTH)
        tl.store(states + place + to, state.to(states.dtype.element_ty), mask=(own < last)[None, :])


@triton.jit
def open_chunk(
    xbc, tokens, chunks, heads, groups, group, place,
    P: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Of a chunk: its tokens, those that there are, its first row, that row in xbc, a group's B and
    C, and their products, of a target's C with the B of its sources."""
    t = tl.arange(0, CHUNK)
    inside = t < tokens - place % chunks * CHUNK
    row = place // chunks * tokens + place % chunks * CHUNK
    channels = heads * P + 2 * groups * N
    xbc += row * channels
    keys = xbc + heads * P + group * N
    b = load_rows(keys, t, channels, inside, N)
    c = load_rows(keys + groups * N, t, channels, inside, N)
    meet = tl.where(t[:, None] >= t[None, :], tl.dot(c, tl.trans(b)), 0.0)
    return t, inside, row, xbc, b, c, meet


@triton.jit(do_not_specialize=["tokens", "chunks", "parts", "each"])
def outputs(
    xbc, sizes, sums, states, skip, y,
    tokens, chunks, heads, groups, parts, each,
    P: tl.constexpr, WIDTH: tl.constexpr, N: tl.constexpr,
    CHUNK: tl.constexpr, CARRIED: tl.constexpr,
):  # fmt: skip
    """What a chunk yields in some neighbouring heads. CARRIED: there are links."""
    group, _, first, last, place = share(groups, parts, heads // groups, each)
    sample, chunk = place // chunks, place % chunks
    channels = heads * P + 2 * groups * N
    t, inside, row, xbc, _, c, meet = open_chunk(
        xbc, tokens, chunks, heads, groups, group, place, P, N, CHUNK
    )
    link = (sample * (chunks - 1) + chunk - 1) * heads
    sums += place * heads * CHUNK
    sizes += place * heads * CHUNK
    y += row * heads * P
    for head in range(first, last):
        some = tl.load(sums + head * CHUNK + t)
        size = tl.load(sizes + head * CHUNK + t)
        x = load_head(xbc + head * P, t, channels, inside, P, WIDTH)
        decay = tl.exp2(tl.minimum(some[:, None] - some[None, :], 0.0))
        mixed = (meet * decay).to(xbc.dtype.element_ty)
        taken = (x * size[:, None]).to(xbc.dtype.element_ty)
        if CARRIED:
            state = load_state(states, link + head, chunk > 0, N, WIDTH)
            out = tl.dot(c, state) * tl.exp2(some)[:, None]
            out = tl.dot(mixed, taken, out)
        else:
            out = tl.dot(mixed, taken)
        out += x * tl.load(skip + head)
        store_head(y + head * P, t, heads * P, inside, out, P, WIDTH)


@triton.jit(do_not_specialize=["tokens", "chunks", "parts", "each"])
def gradients(
    xbc, sizes, sums, states, dstates, skip, grad, dxbc, notes,
    shares, share_stride, share_width,
    tokens, chunks, heads, groups, parts, each,
    P: tl.constexpr, WIDTH: tl.constexpr, N: tl.constexpr,
    CHUNK: tl.constexpr, CARRIED: tl.constexpr,
):  # fmt: skip
    """Gradients of a chunk in some neighbouring heads; of B and C these heads' shares.

    Noted of each head and token: the gradient of the running sum by what stays in the chunk; what
    adds up over its tokens to that by what leaves it; the gradient of the step size; and what adds
    up to that of the skip.
    """
    group, part, first, last, place = share(groups, parts, heads // groups, each)
    sample, chunk = place // chunks, place % chunks
    half = xbc.dtype.element_ty
    channels = heads * P + 2 * groups * N
    t, inside, row, xbc, b, c, meet = open_chunk(
        xbc, tokens, chunks, heads, groups, group, place, P, N, CHUNK
    )
    dmeet = tl.zeros((CHUNK, CHUNK), tl.float32)
    db = tl.zeros((CHUNK, N), tl.float32)
    dc = tl.zeros((CHUNK, N), tl.float32)
    link = (sample * (chunks - 1) + chunk) * heads  # behind this chunk
    sums += place * heads * CHUNK
    sizes += place * heads * CHUNK
    notes += place * heads * CHUNK * 4
    grad += row * heads * P
    dxbc += row * channels
    for head in range(first, last):
        some = tl.load(sums + head * CHUNK + t)
        size = tl.load(sizes + head * CHUNK + t)
        x = load_head(xbc + head * P, t, channels, inside, P, WIDTH)
        dy = load_head(grad + head * P, t, heads * P, inside, P, WIDTH)
        decay = tl.exp2(tl.minimum(some[:, None] - some[None, :], 0.0))
        taken = (x * size[:, None]).to(half)
        dmixed = tl.dot(dy, tl.trans(taken))
        dmeet += decay * dmixed  # of targets before their sources: taken out below
        mixed = (meet * decay).to(half)
        dtaken = tl.dot(tl.trans(mixed), dy)
        # A decay's gradient goes to its target's sum and, negative, to its source's. Both come
        # from the same rounded products: what cancels, the diagonal above all, does so to float32.
        dsum = tl.sum(mixed.to(tl.float32) * dmixed, 1)
        if CARRIED:
            state = load_state(states, link - heads + head, chunk > 0, N, WIDTH)
            dstate = load_state(dstates, link + head, chunk < chunks - 1, N, WIDTH)
            last_sum = tl.load(sums + head * CHUNK + CHUNK - 1)
            since = tl.exp2(some)
            until = tl.exp2(last_sum - some)
            arrived = tl.dot(c, state)
            dsum += since * tl.sum(arrived * dy, 1)
            dc = tl.dot((dy * since[:, None]).to(half), tl.trans(state), dc)
            db = tl.dot((taken * until[:, None]).to(half), tl.trans(dstate), db)
            handed = tl.dot(b, dstate) * until[:, None]
            dtaken += handed
            passed = tl.sum(state.to(tl.float32) * dstate, 1)
            passed = passed if N == CHUNK else tl.where(t == 0, tl.sum(passed, 0), 0.0)
            leaving = tl.sum(handed * taken, 1) + passed * tl.exp2(last_sum)
        else:
            leaving = tl.zeros((CHUNK,), tl.float32)
        dsum -= tl.sum(dtaken * taken, 1)
        dsize = tl.sum(dtaken * x, 1)
        noted = tl.join(tl.join(dsum, dsize), tl.join(leaving, tl.sum(dy.to(tl.float32) * x, 1)))
        at = notes + head * CHUNK * 4 + tl.arange(0, CHUNK * 4)
        tl.store(at, tl.reshape(noted, (CHUNK * 4,)))
        dx = dtaken * size[:, None] + dy * tl.load(skip + head)
        store_head(dxbc + head * P, t, channels, inside, dx, P, WIDTH)
    dmeet = tl.where(t[:, None] >= t[None, :], dmeet, 0.0).to(half)
    db = tl.dot(tl.trans(dmeet), c, db)
    dc = tl.dot(dmeet, b, dc)
    shares += part * share_stride + row * share_width + group * N
    to = shares + t[:, None] * share_width + tl.arange(0, N)[None, :]
    tl.store(to, db.to(shares.dtype.element_ty), mask=inside[:, None])
    tl.store(to + groups * N, dc.to(shares.dtype.element_ty), mask=inside[:, None])
