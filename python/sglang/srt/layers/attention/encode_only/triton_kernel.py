"""Attention over packed sequences as one fused Triton kernel: scores, bias, softmax and sum in one
pass over the keys, nothing of a size of `length × length` in memory.

Needs torch and triton alone; what srt passes to it is in `triton_backend.py`.

Source: the online softmax of FlashAttention-2 (arXiv 2307.08691, algorithm 1).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

# Exponentials are powers of two on a GPU.
LOG2E = tl.constexpr(math.log2(math.e))
# Sequences a program looks at at once, to find its own.
SEARCH = tl.constexpr(128)
# Partial sums a query: as many as there are keys between those of one thread.
PARTS = tl.constexpr(8)


class Blocks(NamedTuple):
    """How a kernel is cut up: queries of a program, keys of a step, warps, steps in flight."""

    queries: int
    keys: int
    warps: int
    stages: int

    @classmethod
    def of(cls, words: str) -> Blocks:
        """Of `64,32,4,3`, as for an option of a command line."""
        return cls(*map(int, words.split(",")))


# By bytes of a number, then by the largest head size they are for.
BLOCKS = {
    2: {64: Blocks(64, 32, 4, 3), 128: Blocks(64, 64, 4, 2), 256: Blocks(64, 32, 8, 2)},
    4: {64: Blocks(64, 32, 8, 2), 128: Blocks(32, 32, 8, 2), 256: Blocks(32, 32, 8, 1)},
}
MAX_HEAD_DIM = 256
BIAS_MARGIN = 256
"""How many columns at each end of a head's row of biases are alike: as many as a block has queries
and keys, or more."""


def blocks_for(head_dim: int, dtype: torch.dtype) -> Blocks:
    """
    Args:
        head_dim: the larger of those of keys and values, at most `MAX_HEAD_DIM`.
    """
    by_head_dim = BLOCKS[dtype.itemsize]
    return by_head_dim[next(limit for limit in by_head_dim if head_dim <= limit)]


@triton.jit
def _load_rows(
    rows_ptr,
    stride,
    count,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """`[ROWS, COLUMNS]`, of which the first `count` rows, or all if WHOLE, and WIDTH columns are
    read, and the others are zero."""
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    pointers = rows_ptr + row * stride + column
    if WHOLE and COLUMNS == WIDTH:
        values = tl.load(pointers)
    else:
        values = tl.load(pointers, mask=(row < count) & (column < WIDTH), other=0.0)
    return values


@triton.jit
def _load_each(pointers, PTX: tl.constexpr):
    """float32 at addresses that overlap from row to row.

    As an ordinary load, Triton would copy each to shared memory, four bytes at a time, and read it
    from there: half of the time of the whole kernel.
    """
    if PTX:
        values = tl.inline_asm_elementwise(
            "ld.global.nc.f32 $0, [$1];",
            "=f,l",
            [pointers.to(tl.int64)],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        values = tl.load(pointers)
    return values


@triton.jit
def _attend_keys(
    o_mv,
    sum_mp,
    max_m,
    q_md,
    k_ptr,
    v_ptr,
    k_stride,
    v_stride,
    bias_ptr,
    shift,
    first_query,
    begin,
    end,
    keys,
    scale,
    QK_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BIAS_REACH: tl.constexpr,
    LOGIT_CAP: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    EDGE: tl.constexpr,
    PTX: tl.constexpr,
):
    """Takes the keys from `begin` to `end` into the sums; EDGE where not every query sees them.

    Scores are kept as products, before they are scaled, and their biases are in the dot from the
    start. `shift` is what all of these scores have more, in the units of the exponential.
    """
    m = tl.arange(0, BLOCK_M).to(tl.int64)
    n = tl.arange(0, BLOCK_N).to(tl.int64)
    query_m = first_query + tl.arange(0, BLOCK_M)
    k_ptr += tl.cast(begin, tl.int64) * k_stride
    v_ptr += tl.cast(begin, tl.int64) * v_stride
    for first in tl.range(begin, end, BLOCK_N):
        if bias_ptr is not None:
            ahead = first - first_query
            if EDGE:
                # All of a far block is one value, so the block at the end of the row is as good.
                lowest = BLOCK_M - 1 - BIAS_REACH
                highest = BIAS_REACH - BLOCK_N + 1
                ahead = tl.minimum(tl.maximum(ahead, lowest), highest)
            # Relative to a thread's first, every index is a constant.
            bias_mn = _load_each(bias_ptr + (BIAS_REACH + ahead) + (n[None, :] - m[:, None]), PTX)
        else:
            bias_mn = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        k_nd = _load_rows(k_ptr, k_stride, keys - first, BLOCK_N, BLOCK_D, QK_DIM, not EDGE)
        k_ptr += BLOCK_N * k_stride
        if LOGIT_CAP > 0:
            # cap * tanh(s / cap), in the units of products.
            s_mn = tl.dot(q_md, tl.trans(k_nd), input_precision="ieee")
            s_mn = tl.exp2(s_mn * (2 * scale / LOGIT_CAP))
            s_mn = (LOGIT_CAP * LOG2E / scale) * (1 - 2 / (s_mn + 1)) + bias_mn
        else:
            s_mn = tl.dot(q_md, tl.trans(k_nd), bias_mn, input_precision="ieee")
        if EDGE:
            key_n = first + tl.arange(0, BLOCK_N)
            seen_mn = (key_n < keys)[None, :]
            if CAUSAL or WINDOW is not None:
                distance_mn = key_n[None, :] - query_m[:, None]
                if CAUSAL:
                    seen_mn = seen_mn & (distance_mn <= 0)
                if WINDOW is not None:
                    seen_mn = seen_mn & (distance_mn >= -WINDOW) & (distance_mn <= WINDOW)
            s_mn = tl.where(seen_mn, s_mn, float("-inf"))
        highest_m = tl.maximum(max_m, tl.max(s_mn, 1) * scale + shift)
        # Infinity less infinity is no number.
        base_m = tl.where(highest_m == float("-inf"), 0.0, highest_m) if EDGE else highest_m
        p_mn = tl.exp2(s_mn * scale - (base_m - shift)[:, None])
        kept_m = tl.exp2(max_m - base_m)
        max_m = highest_m
        # Sums of every PARTS-th key need no exchange between threads.
        parts_mp = tl.sum(tl.reshape(p_mn, BLOCK_M, BLOCK_N // PARTS, PARTS), 1)
        sum_mp = sum_mp * kept_m[:, None] + parts_mp
        v_nv = _load_rows(v_ptr, v_stride, keys - first, BLOCK_N, BLOCK_V, V_DIM, not EDGE)
        v_ptr += BLOCK_N * v_stride
        o_mv = tl.dot(p_mn.to(v_nv.dtype), v_nv, o_mv * kept_m[:, None], input_precision="ieee")
    return o_mv, sum_mp, max_m


# What differs between batches leads to no other kernel: nothing is compiled for a request.
@triton.jit(
    do_not_specialize=["sequences"], do_not_specialize_on_alignment=["starts_ptr", "attend_ptr"]
)
def _packed_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    starts_ptr,
    attend_ptr,
    bias_ptr,
    sequences,
    scale,
    q_stride,
    q_head_stride,
    k_stride,
    k_head_stride,
    v_stride,
    v_head_stride,
    o_stride,
    o_head_stride,
    GROUP: tl.constexpr,
    QK_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BIAS_REACH: tl.constexpr,
    BIAS_NEAR: tl.constexpr,
    LOGIT_CAP: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    PTX: tl.constexpr,
):
    """One block of one sequence's queries, in one head.

    Sequence i has the programs from `starts[i] // BLOCK_M + i`: at least as many as it has blocks,
    and never more than one too many. So the grid follows from the number of tokens and sequences.
    """
    program = tl.program_id(0)
    head = tl.program_id(1)
    # Its sequence comes after all those whose successor's programs have begun.
    over = tl.zeros([SEARCH], tl.int32)
    for first in range(1, sequences, SEARCH):
        i = first + tl.arange(0, SEARCH)
        start = tl.load(starts_ptr + i, mask=i < sequences, other=0)
        over += ((i < sequences) & (start // BLOCK_M + i <= program)).to(tl.int32)
    sequence = tl.sum(over, 0)
    start = tl.load(starts_ptr + sequence)
    first_query = (program - start // BLOCK_M - sequence) * BLOCK_M
    queries = tl.load(starts_ptr + sequence + 1) - start - first_query
    if queries <= 0:
        return
    keys = tl.load(attend_ptr + sequence)

    # Keys from `begin` to `edge` are seen by every query, those from there to `end` by some.
    begin = 0
    end = keys
    edge = keys
    if CAUSAL:
        end = tl.minimum(keys, first_query + BLOCK_M)
        edge = tl.minimum(keys, first_query + 1)
    edge = edge // BLOCK_N * BLOCK_N
    if WINDOW is not None:
        begin = tl.maximum(first_query - WINDOW, 0) // BLOCK_N * BLOCK_N
        end = tl.minimum(end, first_query + BLOCK_M + WINDOW)
        edge = begin

    # A packed batch may hold more numbers than 32 bits count.
    row = tl.cast(start, tl.int64)
    query_row = row + first_query
    k_stride = tl.cast(k_stride, tl.int64)
    v_stride = tl.cast(v_stride, tl.int64)
    q_ptr += query_row * q_stride + head * q_head_stride
    k_ptr += row * k_stride + head // GROUP * k_head_stride
    v_ptr += row * v_stride + head // GROUP * v_head_stride
    o_ptr += query_row * o_stride + head * o_head_stride
    near = begin
    beyond = edge
    before = 0.0
    after = 0.0
    if bias_ptr is not None:
        bias_ptr += head * (2 * BIAS_REACH + 1)
        # Blocks before `near` and from `beyond` on have one bias for all of their scores.
        near = tl.maximum(first_query - BIAS_NEAR, 0) // BLOCK_N * BLOCK_N
        near = tl.minimum(tl.maximum(near, begin), edge)
        beyond = tl.cdiv(first_query + BIAS_NEAR + BLOCK_M, BLOCK_N) * BLOCK_N
        beyond = tl.minimum(beyond, edge)
        before = scale * tl.load(bias_ptr)
        after = scale * tl.load(bias_ptr + 2 * BIAS_REACH)
    bounds = (begin, near, beyond, edge, end)
    shifts = (before, 0.0, after, 0.0)

    q_md = _load_rows(q_ptr, q_stride, queries, BLOCK_M, BLOCK_D, QK_DIM, False)
    o_mv = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    sum_mp = tl.zeros([BLOCK_M, PARTS], tl.float32)
    max_m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for PART in tl.static_range(4):
        # Those far before and far after are parts of their own where there is a bias.
        if bias_ptr is not None or PART % 2 == 1:  # noqa: SIM102 - known when it is compiled
            # A loop without keys would still begin to load some.
            if bounds[PART] < bounds[PART + 1]:
                o_mv, sum_mp, max_m = _attend_keys(
                    o_mv,
                    sum_mp,
                    max_m,
                    q_md,
                    k_ptr,
                    v_ptr,
                    k_stride,
                    v_stride,
                    bias_ptr if PART % 2 == 1 else None,
                    shifts[PART],
                    first_query,
                    bounds[PART],
                    bounds[PART + 1],
                    keys,
                    scale,
                    QK_DIM,
                    V_DIM,
                    BLOCK_M,
                    BLOCK_N,
                    BLOCK_D,
                    BLOCK_V,
                    BIAS_REACH,
                    LOGIT_CAP,
                    CAUSAL,
                    WINDOW,
                    PART == 3,
                    PTX,
                )
    sum_m = tl.sum(sum_mp, 1)
    # A query that sees no key.
    sum_m = tl.where(sum_m == 0, 1.0, sum_m)
    o_mv *= (1 / sum_m)[:, None]
    m = tl.arange(0, BLOCK_M)[:, None]
    v = tl.arange(0, BLOCK_V)[None, :]
    tl.store(
        o_ptr + m * o_stride + v,
        o_mv.to(o_ptr.dtype.element_ty),
        mask=(m < queries) & (v < V_DIM),
    )


def packed_attention(
    q_thd: torch.Tensor,
    k_thd: torch.Tensor,
    v_thd: torch.Tensor,
    starts: torch.Tensor,
    attend: torch.Tensor,
    *,
    scaling: float,
    causal: bool = False,
    window: int | None = None,
    logit_cap: float = 0.0,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    blocks: Blocks | None = None,
) -> torch.Tensor:
    """Attention of each sequence within itself; nothing is waited for.

    Args:
        q_thd: `[tokens, heads, head_dim]` float32, bfloat16 or float16, like k and v. All three may
            have any strides but that of the last dimension, which is 1.
        k_thd: `[tokens, kv_heads, head_dim]`; heads are a multiple of kv_heads.
        v_thd: `[tokens, kv_heads, v_head_dim]`.
        starts: `[sequences + 1]` int32, the row each sequence begins at, and `tokens`.
        attend: `[sequences]` int32, how many leading tokens of each are keys.
        causal: whether a row sees only the keys up to its own position.
        window: how many tokens away a key may be; None for any.
        logit_cap: where positive, a score s becomes `cap * tanh(s / cap)`.
        bias: `[heads, 2 * reach + 1]` float32, contiguous, what is added to the scaled scores.
            Column `reach + d` is for a key d positions after the query. The outermost
            `BIAS_MARGIN` columns at either end are alike, and hold for all that is beyond, too.
            Where scaling is not 1, they are divided by it in every call.
        out: where the result goes; new by default.
        blocks: by default as `blocks_for` has it.

    Returns:
        `[tokens, heads, v_head_dim]` in q's dtype. A row that sees no key is zero.
    """
    tokens, heads, head_dim = q_thd.shape
    kv_heads, v_head_dim = v_thd.shape[1:]
    sequences = len(attend)
    assert k_thd.shape == (tokens, kv_heads, head_dim) and v_thd.shape[0] == tokens
    assert q_thd.dtype == k_thd.dtype == v_thd.dtype
    assert heads % kv_heads == 0 and max(head_dim, v_head_dim) <= MAX_HEAD_DIM
    assert q_thd.stride(2) == k_thd.stride(2) == v_thd.stride(2) == 1
    assert scaling > 0
    assert len(starts) == sequences + 1 and starts.dtype == attend.dtype == torch.int32
    if out is None:
        out = q_thd.new_empty(tokens, heads, v_head_dim)
    if tokens == 0:
        return out
    bias_reach = 0
    if bias is not None:
        assert bias.is_contiguous() and len(bias) == heads and bias.dtype == torch.float32
        bias_reach = bias.shape[1] // 2
        assert bias_reach >= BIAS_MARGIN
        # Products are not scaled yet where it is added.
        bias = bias if scaling == 1 else bias / scaling
    blocks = blocks or blocks_for(max(head_dim, v_head_dim), q_thd.dtype)
    assert blocks.queries + blocks.keys <= BIAS_MARGIN
    _packed_attention_kernel[(tokens // blocks.queries + sequences, heads)](
        q_thd,
        k_thd,
        v_thd,
        out,
        starts,
        attend,
        bias,
        sequences,
        scaling * LOG2E.value,
        *q_thd.stride()[:2],
        *k_thd.stride()[:2],
        *v_thd.stride()[:2],
        *out.stride()[:2],
        GROUP=heads // kv_heads,
        QK_DIM=head_dim,
        V_DIM=v_head_dim,
        BLOCK_M=blocks.queries,
        BLOCK_N=blocks.keys,
        BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
        BLOCK_V=max(16, triton.next_power_of_2(v_head_dim)),
        BIAS_REACH=bias_reach,
        BIAS_NEAR=bias_reach - BIAS_MARGIN,
        LOGIT_CAP=logit_cap,
        CAUSAL=causal,
        WINDOW=window,
        PTX=q_thd.is_cuda and torch.version.hip is None,
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )
    return out
