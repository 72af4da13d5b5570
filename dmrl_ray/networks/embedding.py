"""Encoders of symbols."""

from __future__ import annotations

import math
from typing import Any, Literal

import gymnasium as gym
import torch
from gymnasium.spaces import MultiDiscrete
from torch import Tensor, nn

from dmrl_ray.config.schema import Settings, Size
from dmrl_ray.networks.base import Encoder, Memory, join
from dmrl_ray.networks.cell import step_by_step
from dmrl_ray.networks.recurrent import start_gates


class Embedding(Encoder):
    """A learned vector for each symbol, of tokens (`MultiDiscrete`) or of a one-hot vector."""

    class Config(Settings):
        size: Size = 32
        """Width of the vector of a symbol, and of the features."""

        pool: Literal["mean", "gru"] = "mean"
        """Joins several tokens: mean ignores their order, gru reads them in it."""

    def __init__(self, config: Config, obs_space: gym.Space[Any], extra: int) -> None:
        super().__init__()
        self.tokens = isinstance(obs_space, MultiDiscrete)
        self.plain = False
        self.cell: nn.GRU | None = None
        if isinstance(obs_space, MultiDiscrete):
            self.first: Tensor
            first = torch.from_numpy(obs_space.start).reshape(-1)
            self.register_buffer("first", first, persistent=False)
            self.table = nn.Embedding(int(obs_space.nvec.max()), config.size)
            if config.pool == "gru":
                self.cell = nn.GRU(config.size, config.size)
                start_gates(self.cell)
        else:
            if config.pool != "mean":
                raise ValueError(
                    "network.encoder.pool: there are no tokens to join, found a vector of shape "
                    f"{obs_space.shape}; leave it out"
                )
            self.table = nn.Embedding(math.prod(obs_space.shape or (1,)), config.size)
        self.out_dim = config.size + extra

    def use_plain_operations(self) -> None:
        self.plain = True

    def forward(
        self, obs: Tensor, extra: Tensor | None, memory: Memory, reset: Tensor | None
    ) -> tuple[Tensor, Memory]:
        if not self.tokens:
            return join(obs.flatten(2) @ self.table.weight, extra), ()
        vectors = self.table(obs.flatten(2).long() - self.first)  # (T, B, N, D)
        return join(self._pool(vectors), extra), ()

    def _pool(self, vectors: Tensor) -> Tensor:
        if self.cell is None:
            return vectors.mean(2)
        x = vectors.flatten(0, 1).transpose(0, 1)
        if self.plain:
            last = step_by_step(self.cell, x, (torch.zeros_like(x[0]),), None)[1][0]
        else:
            last = self.cell(x)[1][0]
        return last.reshape(*vectors.shape[:2], -1)
