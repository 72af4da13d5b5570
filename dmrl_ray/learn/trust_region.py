"""A step as long as a trust region allows, along the natural gradient.

Source: Schulman et al., "Trust Region Policy Optimization", 2015, appendix C (arXiv:1502.05477);
its numbers are the defaults of rllab (Duan et al. 2016, arXiv:1604.06778): ten steps of conjugate
gradients, then at most fifteen shorter tries, each 0.8 of the last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


def conjugate_gradient(
    product: Callable[[Tensor], Tensor], target: Tensor, *, iterations: int = 10
) -> Tensor:
    """x with ``product(x) = target``, where product is a symmetric positive matrix (D, D).

    Exact after D iterations, and good long before.
    """
    x = torch.zeros_like(target)
    residual, direction = target.clone(), target.clone()
    size = residual @ residual
    for _ in range(iterations):
        if size < 1e-10:
            break
        image = product(direction)
        step = size / (direction @ image)
        x = x + step * direction
        residual = residual - step * image
        before, size = size, residual @ residual
        direction = residual + size / before * direction
    return x


def trust_region_step(
    parameters: list[nn.Parameter],
    objective: Callable[[], tuple[Tensor, Tensor]],
    *,
    max_kl: float,
    damping: float = 1e-5,
    tries: int = 15,
    shrink: float = 0.8,
) -> dict[str, float]:
    """Lower a loss as far as the KL divergence from where it started stays within `max_kl`.

    Args:
        parameters: what moves; where no try is good enough, they stay.
        objective: loss and KL divergence (both scalars) at the current parameters. Its KL is zero
            and flat at the first call.
        max_kl: nats.
        damping: added to the Hessian's diagonal.
        tries: lengths tried, the first being the longest that a quadratic KL would allow.
        shrink: from one length to the next.

    Returns:
        ``outer_loss`` and ``grad_norm`` before the step, ``kl`` after it; NaN as ``grad_norm``
        says that there was no finite direction.
    """
    loss, kl = objective()
    gradient = _flat(_gradients(loss, parameters, retain_graph=True))
    slope = _flat(_gradients(kl, parameters, create_graph=True))

    def curvature(vector: Tensor) -> Tensor:
        return _flat(_gradients(slope @ vector, parameters, retain_graph=True)) + damping * vector

    direction = conjugate_gradient(curvature, gradient)
    length = torch.sqrt(2 * max_kl / (direction @ curvature(direction)))
    report = {"outer_loss": loss.item(), "grad_norm": gradient.norm().item(), "kl": 0.0}
    if not torch.isfinite(length * direction).all():
        return report | {"grad_norm": float("nan")}
    start = nn.utils.parameters_to_vector(parameters).detach()
    for i in range(tries):
        _move(parameters, start - shrink**i * length * direction)
        new_loss, new_kl = objective()
        if new_loss < loss and new_kl <= max_kl:
            return report | {"kl": new_kl.item()}
    _move(parameters, start)
    return report


def _gradients(
    scalar: Tensor,
    parameters: list[nn.Parameter],
    *,
    retain_graph: bool = False,
    create_graph: bool = False,
) -> tuple[Tensor, ...]:
    return torch.autograd.grad(
        scalar,
        parameters,
        retain_graph=retain_graph or create_graph,
        create_graph=create_graph,
        materialize_grads=True,
    )


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


@torch.no_grad()
def _move(parameters: list[nn.Parameter], vector: Tensor) -> None:
    nn.utils.vector_to_parameters(vector, parameters)
