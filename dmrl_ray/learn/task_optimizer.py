"""An optimiser that moves the parameters of each task by themselves.

It is what PyTorch's is for a single task, and changes nothing in place: agents go from state to
state. Adam as Kingma and Ba (2015, arXiv:1412.6980, algorithm 1); AdamW as Loshchilov and Hutter
(2019, arXiv:1711.05101, algorithm 2).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from dmrl_ray.learn.task_params import Parameters


@dataclass(frozen=True)
class Descending:
    """Parameters of each task in the middle of their optimisation."""

    params: Parameters
    first: Parameters = field(default_factory=dict)  # Adam's moments, empty before the first step
    second: Parameters = field(default_factory=dict)
    steps: int = 0


@dataclass(frozen=True)
class TaskOptimizer:
    """Steps of every task at once.

    Attributes:
        kind: how gradients move the parameters.
        rate: step size of the parameter of a name.
        weight_decay: decoupled with adamw, else an L2 penalty.
        eps: added to the root of Adam's second moment.
        max_grad_norm: a task's gradients longer than this, all parameters taken together, are
            shortened to it; None leaves them.
    """

    kind: Literal["sgd", "adam", "adamw"]
    rate: Callable[[str], float]
    weight_decay: float = 0.0
    eps: float = 1e-8
    max_grad_norm: float | None = None

    @torch.no_grad()
    def step(self, state: Descending, gradients: Parameters) -> Descending:
        """One step of the parameters that have gradients."""
        if self.max_grad_norm is not None:
            gradients = shortened(gradients, self.max_grad_norm)
        params, first, second = dict(state.params), dict(state.first), dict(state.second)
        steps = state.steps + 1
        for name, gradient in gradients.items():
            decay = self.weight_decay * params[name]
            direction = gradient if self.kind == "adamw" else gradient + decay
            if self.kind != "sgd":
                zero = torch.zeros_like(gradient)
                first[name] = first.get(name, zero).lerp(direction, 0.1)
                second[name] = second.get(name, zero).lerp(direction.square(), 0.001)
                scale = (second[name] / (1 - 0.999**steps)).sqrt() + self.eps
                direction = first[name] / (1 - 0.9**steps) / scale
            if self.kind == "adamw":
                direction = direction + decay
            params[name] = params[name] - self.rate(name) * direction
        return Descending(params, first, second, steps)


def shortened(gradients: Parameters, longest: float) -> Parameters:
    """Each task's gradient, no longer than this over all its parameters."""
    square = torch.stack([g.flatten(1).square().sum(1) for g in gradients.values()]).sum(0)
    share: Tensor = (longest / (square.sqrt() + 1e-6)).clamp(max=1.0)  # (N,)
    return {name: g * share.reshape(-1, *[1] * (g.dim() - 1)) for name, g in gradients.items()}
