"""Matrix products by the fastest library that PyTorch brings.

On x86 PyTorch multiplies float32 by MKL, which runs on an AMD core at half the rate of oneDNN (measured on
Zen 5: 100 against 210 GFLOP/s, docs/explanation/speed.md). oneDNN is in the same PyTorch, under the name that
its compiler uses. The choice hangs on the machine alone, so that a resumed run computes as it began.
"""

from __future__ import annotations

import platform

import torch
from torch import Tensor

X86 = ("x86_64", "AMD64", "amd64")


def has_onednn() -> bool:
    """Whether float32 products on the CPU go to oneDNN."""
    return (
        platform.machine() in X86
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


ONEDNN = has_onednn()


def times_transposed(a: Tensor, b: Tensor) -> Tensor:
    """The product of (n, k) and the transpose of (m, k): (n, m)."""
    if ONEDNN and a.dtype == torch.float32 and a.device.type == "cpu" and a.numel() and b.numel():
        result: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
        return result
    return a @ b.mT
