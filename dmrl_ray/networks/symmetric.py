"""An encoder with memory for which no action is special.

Source: Kirsch et al., "Introducing Symmetries to Black Box Meta Reinforcement Learning", 2022
(arXiv:2109.10781): a learning algorithm should not depend on the order of the actions. Here one
recurrent cell is shared by all actions, and a deep set (Zaheer et al. 2017, arXiv:1703.06114,
theorem 7) compares their memories. Left out: symmetry in the observation, and messages that pass
between the cells within the recurrence, which would forbid a kernel that is fused over time.
"""

from __future__ import annotations

import math

import torch
from gymnasium.spaces import Box
from pydantic import Field
from torch import Tensor, nn

from dmrl_ray.config import Settings
from dmrl_ray.networks.base import ACTIVATIONS, Activation, Encoder, Memory, linear
from dmrl_ray.networks.recurrent import over_segments, start_gates


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

    class Config(Settings):
        size: int = Field(default=32, ge=1)
        """Width of the memory of each action (H)."""

        width: int = Field(default=16, ge=1)
        """Features of each action (F)."""

        ordered: bool = True
        """Show each action the memory of the one before it, so that equal ones can be told apart:
        of 50 arms never pulled each deserves a fiftieth of what their sort does, and a worse one
        that was pulled would be the mode. Now the first of them can have it all."""

        activation: Activation = "relu"
        """Of the features."""

    def __init__(self, config: Config, obs_space: Box, extra: int) -> None:
        super().__init__()
        if extra < 3:
            raise ValueError(
                "network.encoder: symmetric needs a policy that sees its previous action and "
                "reward; use rl2, or an encoder of another type"
            )
        self.actions = extra - 2
        self.size, self.width = config.size, config.width
        self.cell = nn.GRU(math.prod(obs_space.shape) + 4, config.size)
        start_gates(self.cell)
        self.common = linear(2 * config.size, config.size, gain=math.sqrt(2))
        self.ordered = config.ordered
        seen = config.size * (2 if config.ordered else 1)
        self.own = linear(seen, config.width, gain=math.sqrt(2))
        self.others = nn.Linear(config.size, config.width, bias=False)
        nn.init.orthogonal_(self.others.weight, math.sqrt(2))
        self.activation = ACTIVATIONS[config.activation]()
        self.out_dim = config.size + self.actions * config.width

    def action_layer(self, size: int) -> nn.Module:
        if size != self.actions:
            raise ValueError(
                f"network.encoder: symmetric counted {self.actions} actions in its input, but "
                f"there are {size}; it supports no network.context"
            )
        return SharedLayer(self.actions, self.width)

    def initial_memory(self, num: int) -> Memory:
        return (torch.zeros(num, self.actions * self.size),)

    def forward(
        self, obs: Tensor, extra: Tensor | None, memory: Memory, reset: Tensor | None
    ) -> tuple[Tensor, Memory]:
        assert extra is not None
        x = self._by_action(obs, extra).flatten(1, 2)  # (T, B * A, D)
        if reset is not None:
            reset = reset.repeat_interleave(self.actions, 1)
        cells: Memory = (memory[0].reshape(-1, self.size),)  # (B * A, H)
        hidden, cells = over_segments(self._run, x, cells, reset)
        hidden = hidden.reshape(*obs.shape[:2], self.actions, self.size)
        return self._compare(hidden), (cells[0].reshape(memory[0].shape),)

    def _by_action(self, obs: Tensor, extra: Tensor) -> Tensor:
        """(T, B, A, D): what the cell of each action sees."""
        mine = extra[..., : self.actions].unsqueeze(-1)
        reward = extra[..., None, self.actions : self.actions + 1]
        shared = torch.cat([extra[..., self.actions :], obs.flatten(2)], -1).unsqueeze(-2)
        shared = shared.expand(*mine.shape[:-1], -1)
        return torch.cat([mine, mine * reward, shared], -1)

    def _run(self, x: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        out, hidden = self.cell(x, memory[0].unsqueeze(0))
        return out, (hidden.squeeze(0),)

    def _compare(self, hidden: Tensor) -> Tensor:
        """(T, B, H + A * F): the common part, and each action's in its light."""
        pooled = torch.cat([hidden.mean(-2), hidden.amax(-2)], -1)
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
