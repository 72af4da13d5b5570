"""The gradient of a loss over a batch: by autograd, or by code that is compiled for just that.

Compiled code fuses what lies between matrix products and has no Python between them: small
networks learn up to twice as fast with it. It is made when a batch of new shapes is met, which
takes seconds the first time on a machine, and is compared there with that of autograd.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from dmrl_ray.backend import compile_graph
from dmrl_ray.errors import ConfigError, NumericalError
from dmrl_ray.networks.actor_critic import ActorCritic
from dmrl_ray.networks.linear import plain_products

Batch: TypeAlias = dict[str, Tensor]
Report: TypeAlias = dict[str, Tensor]
Loss: TypeAlias = Callable[[Batch], tuple[Tensor, Report]]
"""The loss of a batch, and its metrics."""

Grads: TypeAlias = list[Tensor | None]
"""A gradient, parameter by parameter; None where the loss does not depend on it."""

Gradients: TypeAlias = Callable[[dict[str, nn.Parameter], Loss, Batch], tuple[Grads, Report]]

TOLERANCE = 0.03
"""Largest relative error of a compiled gradient; bfloat16 has eight bits."""


def by_autograd(moving: dict[str, nn.Parameter], loss: Loss, batch: Batch) -> tuple[Grads, Report]:
    """The gradient with respect to the parameters `moving`, and the loss's metrics."""
    value, report = loss(batch)
    leaves = list(moving.values())
    grads = torch.autograd.grad(value, leaves, allow_unused=True) if leaves else ()
    return list(grads), {name: x.detach() for name, x in report.items()}


class Compiled:
    """The same as `by_autograd` in compiled code, for losses that read nothing else that changes.

    A loss reads the policy's parameters and buffers, and the batch; plain numbers that it reads
    beside them stay what they are at its first call.

    Args:
        policy: without memory, whose kernels cannot be compiled, and without layers that draw
            random numbers or keep statistics.

    Attributes:
        seconds: spent on compiling so far.

    Raises:
        ConfigError: the policy does not meet these conditions.
    """

    def __init__(self, policy: ActorCritic) -> None:
        unfit = (nn.Dropout, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
        if policy.recurrent or any(isinstance(module, unfit) for module in policy.modules()):
            raise ConfigError(
                "learners.compile: policies with memory, dropout or batch normalisation cannot be "
                "compiled; use false"
            )
        self.seconds = 0.0
        self._policy = policy
        self._functions: dict[object, tuple[Callable[..., list[Any]], list[str]]] = {}

    def __call__(
        self, moving: dict[str, nn.Parameter], loss: Loss, batch: Batch
    ) -> tuple[Grads, Report]:
        """As `by_autograd`.

        Raises:
            ConfigError: there is no compiler, or it fails.
            NumericalError: the compiled gradient is not that of autograd.
        """
        key = (*moving, *((name, x.shape, x.dtype, x.device) for name, x in batch.items()))
        if key in self._functions:
            return self._call(key, moving, batch)
        start = time.monotonic()
        expected, report = by_autograd(moving, loss, batch)
        self._functions[key] = self._compile(moving, loss, batch), list(report)
        grads, report = self._call(key, moving, batch)
        _compare(expected, grads)
        self.seconds += time.monotonic() - start
        return grads, report

    def _call(
        self, key: object, moving: dict[str, nn.Parameter], batch: Batch
    ) -> tuple[Grads, Report]:
        function, names = self._functions[key]
        with torch.no_grad():
            answers = function(*self._state(moving).values(), *batch.values())
        grads, report = answers[: len(moving)], answers[len(moving) :]
        return grads, dict(zip(names, report, strict=True))

    def _state(self, moving: dict[str, nn.Parameter]) -> dict[str, Tensor]:
        """All tensors of the policy, those that move first."""
        state = {name: p.detach() for name, p in moving.items()}
        others = (*self._policy.named_parameters(), *self._policy.named_buffers())
        return state | {name: x.detach() for name, x in others if name not in moving}

    def _compile(
        self, moving: dict[str, nn.Parameter], loss: Loss, batch: Batch
    ) -> Callable[..., list[Any]]:
        # Others than those who compile need not wait for this import.
        from torch.fx.experimental.proxy_tensor import make_fx

        state = self._state(moving)
        module = _Loss(self._policy, loss)

        def function(*tensors: Tensor) -> list[Any]:
            parts: Iterator[Tensor] = iter(tensors)
            given = {name: next(parts) for name in state}
            leaves: dict[str, Any] = {n: given[n].detach().requires_grad_() for n in moving}
            swapped = {f"policy.{name}": x for name, x in (given | leaves).items()}
            inputs = dict(zip(batch, parts, strict=True))
            grads, report = by_autograd(
                leaves, lambda batch: torch.func.functional_call(module, swapped, (batch,)), inputs
            )
            return [*grads, *report.values()]

        tensors: list[Any] = [*state.values(), *batch.values()]
        try:
            with plain_products():
                graph = make_fx(function)(*tensors)
            return compile_graph(graph, tensors)
        except Exception as error:  # A compiler may fail in any way.
            raise ConfigError(
                f"learners.compile: the loss could not be compiled ({type(error).__name__}: "
                f"{str(error).splitlines()[0]}); it takes a C++ compiler such as g++, or use false"
            ) from error


class _Loss(nn.Module):
    """A loss as a module that has the policy in it, so that its tensors can be exchanged."""

    def __init__(self, policy: ActorCritic, loss: Loss) -> None:
        super().__init__()
        self.policy = policy
        self._loss = loss

    def forward(self, batch: Batch) -> tuple[Tensor, Report]:
        return self._loss(batch)


def _compare(expected: Grads, found: Grads) -> None:
    pairs = [(a, b) for a, b in zip(expected, found, strict=True) if a is not None]
    length = torch.cat([a.flatten() for a, _ in pairs]).norm()
    off = torch.cat([(a - b).flatten() for a, b in pairs if b is not None]).norm()
    agrees = all(b is not None for _, b in pairs) and bool(off <= TOLERANCE * length + 1e-8)
    if torch.isfinite(length) and not agrees:  # Where it is not, the batch is at fault.
        raise NumericalError(
            f"learners.compile: the compiled gradient is off by {off:.3g} of {length:.3g}; use "
            "false"
        )
