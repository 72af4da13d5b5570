"""An encoder that remembers each action in each place apart.

The memory of `Symmetric`, with cells of its own for every place: what was learned of an action
holds where it was taken. For tasks with few, one-hot observations, whose states mean nothing
before the trial has revealed their rewards.
"""

from __future__ import annotations

import math

import torch
from gymnasium.spaces import Box
from torch import Tensor

from dmrl_ray.networks.base import Memory, reset_memory
from dmrl_ray.networks.symmetric import CellConfig, Symmetric


class Tabular(Symmetric):
    """One GRU, copied for every action in every place; a step changes one copy.

    Memory is (B, S * A * H) and the place before (B, 1). Features are as in `Symmetric`, of the
    actions where the agent is now.

    Args:
        config: widths.
        obs_space: (S,) one-hot places.
        extra: A + 2 for the previous action, reward and done.

    Raises:
        ValueError: observations are no vectors.
    """

    class Config(CellConfig):
        """One cell is changed by a step, which leaves nothing to choose."""

    def __init__(self, config: Config, obs_space: Box, extra: int) -> None:
        if len(obs_space.shape) != 1:
            raise ValueError(
                "network.encoder: tabular needs one-hot observations, but the tasks' have shape "
                f"{obs_space.shape}; use symmetric or a recurrent encoder"
            )
        super().__init__(Symmetric.Config(**dict(config), updates="taken"), obs_space, extra)
        self.places = math.prod(obs_space.shape)

    def initial_memory(self, num: int) -> Memory:
        width = self.places * self.actions * self.hidden_size
        return torch.zeros(num, width), torch.zeros(num, 1)

    def forward(
        self, obs: Tensor, extra: Tensor | None, memory: Memory, reset: Tensor | None
    ) -> tuple[Tensor, Memory]:
        assert extra is not None
        mine, shared = extra[..., : self.actions], extra[..., self.actions :]
        shared = torch.cat([shared, obs], -1)  # reward, done, place
        taken, action, place = (mine > 0.5).any(-1), mine.argmax(-1), obs.argmax(-1)
        x = torch.cat([torch.ones_like(shared[..., :1]), shared[..., :1], shared], -1)
        envs, weights = (
            torch.arange(obs.shape[1], device=obs.device),
            list(self.cell.parameters()),
        )
        cells = memory[0].reshape(len(memory[0]), -1, self.hidden_size)  # (B, S * A, H)
        before = memory[1][:, 0].long()
        hidden, pooled = [], []
        for t in range(len(obs)):
            if reset is not None:
                (cells,) = reset_memory((cells,), reset[t])
            at = (envs, before * self.actions + action[t])
            old = cells[at]
            now = torch.gru_cell(x[t], old, *weights)
            cells = cells.index_put(at, torch.where(taken[t].unsqueeze(-1), now, old))
            before = place[t]
            hidden.append(cells.reshape(len(envs), self.places, -1)[envs, before])
            pooled.append(torch.cat([cells.mean(1), cells.amax(1)], -1))
        here = torch.stack(hidden).reshape(*obs.shape[:2], self.actions, self.hidden_size)
        features = self.compare(here, torch.cat([torch.stack(pooled), shared], -1))
        return features, (cells.reshape(memory[0].shape), before.unsqueeze(-1).to(obs.dtype))
