"""Focal loss: what a network has right already counts less, so that the rest counts more.

    FL = (1 - p_t)^gamma * CE        p_t: probability of the true class; gamma = 0: CE itself

Source: Lin et al., Focal Loss for Dense Object Detection, ICCV 2017 (arXiv 1708.02002), equation 4; the alpha
of their equation 5 is a class weight. With label smoothing the factor is that of the true class, and CE that
of the smoothed target: the paper has no smoothing.

The factor is computed as ``exp(gamma log(1 - p_t))`` from the outputs: 1 - p_t would be 0 in float32 where
p_t is past 1 - 6e-8, and the gradient of its power not a number for gamma below 1.
"""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn import functional


def softmax_focus(output_MBK: Tensor, target_B: Tensor, gamma: float) -> Tensor:
    """``(1 - p_t)^gamma`` of a softmax: (M, B).

    Args:
        output_MBK: before the softmax.
        target_B: class indices.
        gamma: above 0.
    """
    index_MB1 = target_B.expand(output_MBK.shape[:2])[..., None]
    others_MBK = output_MBK.scatter(-1, index_MB1, -math.inf)
    log_wrong_MB = others_MBK.logsumexp(-1) - output_MBK.logsumexp(-1)
    return (gamma * log_wrong_MB).exp()


def sigmoid_focus(output_MBK: Tensor, target_BK: Tensor, gamma: float) -> Tensor:
    """``(1 - p_t)^gamma`` of K sigmoids: (M, B, K).

    Args:
        output_MBK: before the sigmoid.
        target_BK: 0 or 1.
        gamma: above 0.
    """
    return (gamma * functional.logsigmoid(output_MBK * (1 - 2 * target_BK))).exp()
