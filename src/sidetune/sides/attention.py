"""Softmax attention and its gradient as plain functions, for autograd functions of our own.

On the CPU these are the two halves of PyTorch's own flash attention, which keep one number a query; on
another device the weights of the attention are computed again, an (N, N) matrix a sample and head.
"""

from __future__ import annotations

import torch
from torch import Tensor


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """softmax(q k^T + bias) v, and the logarithm of the sum that the softmax divides by.

    Args:
        q: (C, heads, N, d), scaled.
        k: likewise, not scaled.
        v: likewise.
        bias: (C, 1, 1, N), -inf at tokens that are no keys; None: all are.

    Returns:
        (C, heads, N, d) and (C, heads, N).
    """
    if q.device.type == "cpu":
        mixed, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, attn_mask=bias, scale=1.0
        )
        return mixed, log_sum
    scores = _scores(q, k, bias)
    log_sum = scores.logsumexp(-1)
    return torch.exp(scores - log_sum[..., None]) @ v, log_sum


def attend_backward(
    d_mixed: Tensor,
    inputs: tuple[Tensor, Tensor, Tensor],
    outputs: tuple[Tensor, Tensor],
    bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v.

    Args:
        d_mixed: gradient of the first output of `attend`.
        inputs: its q, k and v.
        outputs: what it returned.
        bias: as it was given.
    """
    (q, k, v), (mixed, log_sum) = inputs, outputs
    if q.device.type == "cpu":
        gradients: tuple[Tensor, Tensor, Tensor] = (
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                d_mixed, q, k, v, mixed, log_sum, 0.0, is_causal=False, attn_mask=bias, scale=1.0
            )
        )
        return gradients
    weights = torch.exp(_scores(q, k, bias) - log_sum[..., None])
    inner = (d_mixed * mixed).sum(-1, keepdim=True)
    d_scores = weights * (d_mixed @ v.mT - inner)
    return d_scores @ k, d_scores.mT @ q, weights.mT @ d_mixed


def _scores(q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
    return q @ k.mT if bias is None else q @ k.mT + bias
