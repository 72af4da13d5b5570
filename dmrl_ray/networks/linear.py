"""The linear layer, by the faster of two libraries.

On a CPU PyTorch multiplies through MKL, which holds back on processors that are not Intel's:
oneDNN, which comes with PyTorch as well, took half its time for a layer of 64 units on 4096 rows.
For few rows the preparations of oneDNN cost more than that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dmrl_ray.backend import onednn_linear, transformed

MIN_ROWS = 512
MIN_UNITS = 16
HAS_ONEDNN = bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]

_plain = False


@contextmanager
def plain_products() -> Iterator[None]:
    """Meanwhile layers multiply through PyTorch's own operations, which compilers know."""
    global _plain
    before, _plain = _plain, True
    try:
        yield
    finally:
        _plain = before


class Linear(nn.Linear):
    """`nn.Linear`, with the same weights and gradients."""

    def forward(self, input: Tensor) -> Tensor:
        if not self._suits(input):
            return functional.linear(input, self.weight, self.bias)
        product: Callable[..., Tensor] = _Product.apply
        rows = product(input.flatten(0, -2), self.weight, self.bias)
        return rows if input.dim() == 2 else rows.view(*input.shape[:-1], -1)

    def _suits(self, input: Tensor) -> bool:
        return (
            input.numel() >= MIN_ROWS * self.in_features
            and self.out_features >= MIN_UNITS
            and input.dim() > 1
            and input.dtype == torch.float32
            and input.device.type == "cpu"
            and HAS_ONEDNN
            and not _plain
            and not torch.is_autocast_enabled("cpu")
            # Many weights at once are a batched product, which is MKL's alone.
            and not transformed()
        )


class _Product(torch.autograd.Function):
    """(N, in), (out, in), (out,) -> (N, out).

    Without `setup_context`, for which PyTorch looks up the signature at each call: 80 us.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return onednn_linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad[0]
        if torch.is_grad_enabled():  # Someone will differentiate this, too.
            return (slope @ weight if wanted else None), slope.t() @ x, slope.sum(0)
        of_x = onednn_linear(slope, weight.t(), None) if wanted else None
        return of_x, onednn_linear(x.t(), slope.t(), None).t(), slope.sum(0)
