"""Attention over packed sequences in plain float64 torch: what every backend is compared with."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def reference_attention(
    q_thd: torch.Tensor,
    k_thd: torch.Tensor,
    v_thd: torch.Tensor,
    lengths: Sequence[int],
    *,
    scaling: float,
    attend: Sequence[int] | None = None,
    causal: bool = False,
    bias: torch.Tensor | None = None,
    logit_cap: float = 0.0,
    window: int | None = None,
) -> torch.Tensor:
    """Attention of each sequence within itself.

    Args:
        q_thd: `[tokens, heads, head_dim]`; tokens are the sum of `lengths`.
        k_thd: `[tokens, kv_heads, head_dim]`; heads are a multiple of kv_heads.
        v_thd: `[tokens, kv_heads, v_head_dim]`.
        attend: how many leading tokens of each sequence are keys; all by default.
        causal: whether a row sees only the keys up to its own position.
        bias: `[heads, 2 * longest - 1]`, added to the scores; column `longest - 1 + d` is for a
            key d positions after the query.
        logit_cap: where positive, a score s becomes `cap * tanh(s / cap)`.
        window: how many tokens away a key may be; None for any. A row without keys is zero.

    Returns:
        `[tokens, heads, v_head_dim]` float64.
    """
    heads = q_thd.shape[1]
    group = heads // k_thd.shape[1]
    outputs = []
    start = 0
    for i, length in enumerate(lengths):
        keys = length if attend is None else attend[i]
        q = q_thd[start : start + length].double().transpose(0, 1)
        k = k_thd[start : start + keys].double().transpose(0, 1).repeat_interleave(group, 0)
        v = v_thd[start : start + keys].double().transpose(0, 1).repeat_interleave(group, 0)
        start += length
        scores = q @ k.transpose(1, 2) * scaling
        if logit_cap > 0:
            scores = logit_cap * torch.tanh(scores / logit_cap)
        positions = torch.arange(length, device=q.device)
        distance = positions[None, :keys] - positions[:, None]
        if bias is not None:
            scores = scores + bias.double()[:, distance + bias.shape[1] // 2]
        if causal:
            scores = scores.masked_fill(distance > 0, float("-inf"))
        if window is not None:
            scores = scores.masked_fill(distance.abs() > window, float("-inf"))
        outputs.append((scores.softmax(dim=-1).nan_to_num(0) @ v).transpose(0, 1))
    return torch.cat(outputs) if outputs else q_thd.double()
