"""PyTorch's optimisers without its compiler.

`torch.optim` guards some methods against being compiled, and imports the compiler for that into
every process that makes an optimiser: 1.2 s and 73 MB. No step of an optimiser is compiled here, so
the methods are used as they are within the guards.
"""

from __future__ import annotations

from inspect import unwrap

import torch


class Adam(torch.optim.Adam):
    """Adam (Kingma and Ba, arXiv:1412.6980)."""

    add_param_group = unwrap(torch.optim.Adam.add_param_group)
    step = torch.no_grad()(unwrap(torch.optim.Adam.step))


class AdamW(torch.optim.AdamW):
    """Adam with decoupled weight decay (Loshchilov and Hutter, arXiv:1711.05101)."""

    add_param_group = unwrap(torch.optim.AdamW.add_param_group)
    step = torch.no_grad()(unwrap(torch.optim.AdamW.step))


class SGD(torch.optim.SGD):
    """Stochastic gradient descent."""

    add_param_group = unwrap(torch.optim.SGD.add_param_group)
    step = torch.no_grad()(unwrap(torch.optim.SGD.step))
