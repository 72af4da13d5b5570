"""Recurrent encoders."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from itertools import pairwise
from typing import Literal

import torch
from gymnasium.spaces import Box
from pydantic import Field
from torch import Tensor, nn

from dmrl_ray.config.components import Size
from dmrl_ray.networks.base import Memory, TorsoEncoder, reset_memory
from dmrl_ray.networks.cell import step_by_step


def over_segments(
    run: Callable[[Tensor, Memory], tuple[Tensor, Memory]],
    x: Tensor,
    memory: Memory,
    reset: Tensor | None,
) -> tuple[Tensor, Memory]:
    """Run a fused kernel over a sequence (T, B, D), once for each stretch without a reset.

    Memory leaves are (B, H); `reset` (T, B) zeroes them before a step.
    """
    if reset is None:
        return run(x, memory)
    if len(x) == 1:  # Acting on a device does not wait for where the resets are.
        return run(x, reset_memory(memory, reset[0]))
    starts = [0, *(reset[1:].any(1).nonzero().flatten() + 1).tolist(), x.shape[0]]
    parts = []
    for start, stop in pairwise(starts):
        part, memory = run(x[start:stop], reset_memory(memory, reset[start]))
        parts.append(part)
    return (parts[0] if len(parts) == 1 else torch.cat(parts)), memory


def start_gates(cell: nn.RNNBase) -> None:
    """Orthogonal weights, gate by gate, and biases of zero."""
    for name, parameter in cell.named_parameters():
        if name.startswith("weight"):
            for gate in parameter.chunk(parameter.shape[0] // cell.hidden_size):
                nn.init.orthogonal_(gate)
        else:
            nn.init.zeros_(parameter)


class _Recurrent(TorsoEncoder):
    """A torso, then one recurrent layer; the kernel is fused over steps without a reset."""

    class Config(TorsoEncoder.Config):
        hidden_size: Size = 128
        """Width of the memory."""

        layer_norm: bool = False
        """Normalise the features over their units; the memory itself stays as it is."""

        dropout: float = Field(default=0.0, ge=0, lt=1)
        """Share of features that are left out in a gradient step of the learner."""

    leaves: int
    plain = False

    def __init__(self, config: Config, obs_space: Box, extra: int) -> None:
        super().__init__(config, obs_space, extra)
        self.cell = self.build(config)
        start_gates(self.cell)
        self.norm = nn.LayerNorm(config.hidden_size) if config.layer_norm else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)
        self.out_dim = config.hidden_size

    def initial_memory(self, num: int) -> Memory:
        return tuple(torch.zeros(num, self.out_dim) for _ in range(self.leaves))

    def use_plain_operations(self) -> None:
        self.plain = True
        if self.torso is not None:
            self.torso.use_plain_operations()

    def forward(
        self, obs: Tensor, extra: Tensor | None, memory: Memory, reset: Tensor | None
    ) -> tuple[Tensor, Memory]:
        x = self.read(obs, extra)
        if self.plain:
            out, memory = step_by_step(self.cell, x, memory, reset)
        else:
            out, memory = over_segments(self._run, x, memory, reset)
        return self.dropout(self.norm(out)), memory

    @abstractmethod
    def build(self, config: Config) -> nn.RNNBase:
        """The recurrent layer."""

    def _run(self, x: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        out, hidden = self.cell(x, memory[0].unsqueeze(0))
        return out, (hidden.squeeze(0),)


class LSTM(_Recurrent):
    """Long short-term memory (Hochreiter and Schmidhuber, 1997)."""

    leaves = 2

    def build(self, config: _Recurrent.Config) -> nn.RNNBase:
        return nn.LSTM(self.in_dim, config.hidden_size)

    def _run(self, x: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        out, (hidden, cell) = self.cell(x, (memory[0].unsqueeze(0), memory[1].unsqueeze(0)))
        return out, (hidden.squeeze(0), cell.squeeze(0))


class GRU(_Recurrent):
    """Gated recurrent unit (Cho et al., 2014)."""

    leaves = 1

    def build(self, config: _Recurrent.Config) -> nn.RNNBase:
        return nn.GRU(self.in_dim, config.hidden_size)


class RNN(_Recurrent):
    """Without gates (Elman, 1990): several times as fast, and forgets sooner."""

    class Config(_Recurrent.Config):
        activation: Literal["tanh", "relu"] = "tanh"
        """Activation of the memory."""

    leaves = 1

    def build(self, config: _Recurrent.Config) -> nn.RNNBase:
        assert isinstance(config, RNN.Config)
        return nn.RNN(self.in_dim, config.hidden_size, nonlinearity=config.activation)
