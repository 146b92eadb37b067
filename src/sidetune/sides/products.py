"""Matrix products by the fastest library that PyTorch brings.

On x86 PyTorch multiplies float32 by MKL, which runs on an AMD core at half the rate of oneDNN (measured on
Zen 5: 100 against 210 GFLOP/s, docs/explanation/speed.md). oneDNN is in the same PyTorch, under the name that
its compiler uses. A call of it costs 12 microseconds, so thin products stay with MKL. The choice hangs on the
machine and the shapes alone, so that a resumed run computes as it began.
"""

from __future__ import annotations

import platform

import torch
from torch import Tensor

WIDE = 2**20  # n*m*k of a product that is worth a call of oneDNN's, where many could be one call of MKL's
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
    if _by_onednn(a) and a.numel() and b.numel():
        result: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
        return result
    return a @ b.mT


def each_times_transposed(a_Mnk: Tensor, b_Mmk: Tensor) -> Tensor:
    """The products of (n, k) and the transpose of (m, k), each of M: (M, n, m)."""
    if not wide(a_Mnk[0], b_Mmk[0]):
        return torch.bmm(a_Mnk, b_Mmk.mT)
    products = [times_transposed(a, b) for a, b in zip(a_Mnk.unbind(), b_Mmk.unbind(), strict=True)]
    return products[0][None] if len(products) == 1 else torch.stack(products)


def add_times_transposed(into_Mnm: Tensor, a_Mnk: Tensor, b_Mmk: Tensor) -> None:
    """Add `each_times_transposed` to a tensor in place."""
    if not wide(a_Mnk[0], b_Mmk[0]):
        into_Mnm.baddbmm_(a_Mnk, b_Mmk.mT)
        return
    for into, a, b in zip(into_Mnm.unbind(), a_Mnk.unbind(), b_Mmk.unbind(), strict=True):
        into.add_(times_transposed(a, b))


def wide(a: Tensor, b: Tensor) -> bool:
    """Whether the product of (n, k) and the transpose of (m, k) is worth a call of its own."""
    return _by_onednn(a) and a.numel() * len(b) >= WIDE


def _by_onednn(a: Tensor) -> bool:
    return ONEDNN and a.dtype == torch.float32 and a.device.type == "cpu"
