"""An encoder with memory for which no action is special.

Source: Kirsch et al., "Introducing Symmetries to Black Box Meta Reinforcement Learning", 2022
(arXiv:2109.10781): a learning algorithm should not depend on the order of the actions. Here one
recurrent cell is shared by all actions, and a deep set (Zaheer et al. 2017, arXiv:1703.06114,
theorem 7) compares their memories. Left out: symmetry in the observation, and messages that pass
between the cells within the recurrence, which would forbid a kernel that is fused over time.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from gymnasium.spaces import Box
from torch import Tensor, nn

from dmrl_ray.config.schema import Settings, Size
from dmrl_ray.networks.base import (
    ACTIVATIONS,
    Activation,
    Encoder,
    Memory,
    join,
    linear,
    reset_memory,
)
from dmrl_ray.networks.recurrent import over_segments, start_gates


class CellConfig(Settings):
    """Settings of a memory of cells, one for each action."""

    hidden_size: Size = 32
    """Width of the memory of each action (H)."""

    width: Size = 16
    """Features of each action (F)."""

    ordered: bool = True
    """Give each action the memory of the one before it, to distinguish equal ones: 50 arms that
    were never pulled would share their probability evenly, and a worse arm that was pulled would be
    the mode. With it the first of them can have all of it."""

    activation: Activation = "relu"
    """Activation of the features."""


class Symmetric(Encoder):
    """A copy of one GRU for every action: permuted actions have permuted logits.

    The cell of an action sees whether it was the previous action and its reward if so, the
    previous reward and done, and the whole observation. Memory is (B, A * H). Features are what
    all actions have in common, then those of each action.

    Args:
        config: widths.
        obs_space: of one observation.
        extra: A + 2 for the previous action, reward and done; a context is not supported.
    """

    class Config(CellConfig):
        updates: Literal["all", "taken"] = "all"
        """Cells that a step changes: all, or that of the previous action alone, which with many
        actions is several times as fast; the others then learn of the time from the common part."""

    def __init__(self, config: Config, obs_space: Box, extra: int) -> None:
        super().__init__()
        if extra < 3:
            raise ValueError(
                "network.encoder: symmetric needs a policy that sees its previous action and "
                "reward; use rl2, or an encoder of another type"
            )
        self.actions = extra - 2
        self.hidden_size, self.width = config.hidden_size, config.width
        self.taken = config.updates == "taken"
        shared = math.prod(obs_space.shape) + 2
        self.cell = nn.GRU(shared + 2, config.hidden_size)
        start_gates(self.cell)
        pooled = 2 * config.hidden_size + (shared if self.taken else 0)
        self.common = linear(pooled, config.hidden_size, gain=math.sqrt(2))
        self.ordered = config.ordered
        seen = config.hidden_size * (2 if config.ordered else 1)
        self.own = linear(seen, config.width, gain=math.sqrt(2))
        self.others = nn.Linear(config.hidden_size, config.width, bias=False)
        nn.init.orthogonal_(self.others.weight, math.sqrt(2))
        self.activation = ACTIVATIONS[config.activation]()
        self.out_dim = config.hidden_size + self.actions * config.width

    def action_layer(self, size: int) -> nn.Module:
        if size != self.actions:
            raise ValueError(
                f"network.encoder: symmetric counted {self.actions} actions in its input, but "
                f"there are {size}; it supports no network.context"
            )
        return SharedLayer(self.actions, self.width)

    def initial_memory(self, num: int) -> Memory:
        return (torch.zeros(num, self.actions * self.hidden_size),)

    def forward(
        self, obs: Tensor, extra: Tensor | None, memory: Memory, reset: Tensor | None
    ) -> tuple[Tensor, Memory]:
        assert extra is not None
        cells = memory[0].reshape(len(memory[0]), self.actions, self.hidden_size)
        mine, shared = extra[..., : self.actions], extra[..., self.actions :]
        shared = torch.cat([shared, obs.flatten(2)], -1)  # reward, done, observation
        run = self._step_taken if self.taken else self._step_all
        hidden, cells = run(mine, shared, cells, reset)
        pooled = torch.cat([hidden.mean(-2), hidden.amax(-2)], -1)
        features = self.compare(hidden, join(pooled, shared if self.taken else None))
        return features, (cells.reshape(memory[0].shape),)

    def _step_all(
        self, mine: Tensor, shared: Tensor, cells: Tensor, reset: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Memories (T, B, A, H) after each step, and the last; all actions are one batch."""
        mine = mine.unsqueeze(-1)
        reward = shared[..., None, :1]
        every = shared.unsqueeze(-2).expand(*mine.shape[:-1], -1)
        x = torch.cat([mine, mine * reward, every], -1).flatten(1, 2)  # (T, B * A, D)
        if reset is not None:
            reset = reset.repeat_interleave(self.actions, 1)
        hidden, last = over_segments(self._run, x, (cells.flatten(0, 1),), reset)
        return hidden.reshape(len(x), *cells.shape), last[0].reshape(cells.shape)

    def _step_taken(
        self, mine: Tensor, shared: Tensor, cells: Tensor, reset: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The same, where a step changes the memory of the previous action alone."""
        x = torch.cat([torch.ones_like(shared[..., :1]), shared[..., :1], shared], -1)
        taken, action = (mine > 0.5).unsqueeze(-1), mine.argmax(-1)
        rows, weights = torch.arange(x.shape[1], device=x.device), list(self.cell.parameters())
        hidden = []
        for t in range(len(x)):
            if reset is not None:
                (cells,) = reset_memory((cells,), reset[t])
            now = torch.gru_cell(x[t], cells[rows, action[t]], *weights)
            cells = torch.where(taken[t], now.unsqueeze(1), cells)
            hidden.append(cells)
        return torch.stack(hidden), cells

    def _run(self, x: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        out, hidden = self.cell(x, memory[0].unsqueeze(0))
        return out, (hidden.squeeze(0),)

    def compare(self, hidden: Tensor, pooled: Tensor) -> Tensor:
        """(T, B, H + A * F): the common part, and each action's in its light.

        Args:
            hidden: (T, B, A, H) memories of the actions.
            pooled: (T, B, P) what all memories hold, and what else all share.
        """
        common = self.activation(self.common(pooled))
        own = hidden
        if self.ordered:
            before = torch.cat([torch.ones_like(hidden[..., :1, :]), hidden[..., :-1, :]], -2)
            own = torch.cat([hidden, before], -1)
        each = self.activation(self.own(own) + self.others(common).unsqueeze(-2))
        return torch.cat([common, each.flatten(-2)], -1)


class SharedLayer(nn.Module):
    """From the features of each action to its logit, by the same weights."""

    def __init__(self, actions: int, width: int) -> None:
        super().__init__()
        self.shape = (actions, width)
        self.layer = linear(width, 1, gain=0.01)

    def forward(self, features: Tensor) -> Tensor:
        own = features[..., -math.prod(self.shape) :].reshape(*features.shape[:-1], *self.shape)
        logits: Tensor = self.layer(own).squeeze(-1)
        return logits
