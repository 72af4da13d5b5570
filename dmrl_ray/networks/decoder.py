"""Decoders: the steps of a trial, predicted from samples of the posterior over the task.

Source: Zintgraf et al., "VariBAD: A Very Good Method for Bayes-Adaptive Deep RL via
Meta-Learning", 2020, section 3.1 (arXiv:1910.08348).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from dmrl_ray.config.schema import Settings, Sizes
from dmrl_ray.losses.latent import reconstruction_loss
from dmrl_ray.networks.base import linear, stack


class TrialDecoder(nn.Module):
    """Predicts the rewards of a whole trial, and its observations if set, from each sample.

    Args:
        config: which parts are predicted, and how.
        latent: L, dimensions of the latent task.
        width: D, of an observation.
        actions: A, of an encoded action.
    """

    class Config(Settings):
        """Which parts of a trial are predicted, and how."""

        rewards: Literal["squared", "binary"] = "squared"
        """Predict the reward, by its squared error, or the probability of a positive one, by its
        log-likelihood."""

        heads: Literal["action", "next_obs"] | None = None
        """Predict rewards by one head for each entry of this one-hot vector, from the latent alone;
        null predicts them from latent, observation, action and next observation."""

        decode_obs: bool = False
        """Predict the next observation, too, for tasks that differ in their dynamics."""

        hidden_sizes: Sizes = Field(default=(32, 32), min_length=1)
        """Width of each layer."""

    def __init__(self, config: Config, latent: int, width: int, actions: int) -> None:
        super().__init__()
        self.config = config
        self.reward: StepDecoder | HeadDecoder
        if config.heads is None:
            self.reward = StepDecoder(latent, 2 * width + actions, 1, config.hidden_sizes)
        else:
            heads = actions if config.heads == "action" else width
            self.reward = HeadDecoder(latent, heads, config.hidden_sizes)
        self.obs: StepDecoder | None = None
        if config.decode_obs:
            self.obs = StepDecoder(latent, width + actions, width, config.hidden_sizes)

    def forward(
        self,
        latent: Tensor,
        obs: Tensor,
        action: Tensor,
        next_obs: Tensor,
        reward: Tensor,
        mask: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The terms of eq. 8: losses of rewards and observations, given samples for B trials.

        Args:
            latent: (S, B, L).
            obs: (T, B, D).
            action: (T, B, A), encoded.
            next_obs: (T, B, D), true successors.
            reward: (T, B).
            mask: (S, T, B) bool, predictions that count; None is all.
        """
        config = self.config
        if config.heads is None:
            step = torch.cat([obs, action, next_obs], -1)
        else:
            step = action if config.heads == "action" else next_obs
        target, binary = reward.unsqueeze(-1), config.rewards == "binary"
        predicted = self.reward(latent, step)
        losses = {"reward_loss": reconstruction_loss(predicted, target, binary=binary, mask=mask)}
        if self.obs is not None:
            predicted = self.obs(latent, torch.cat([obs, action], -1))
            losses["obs_loss"] = reconstruction_loss(predicted, next_obs, binary=False, mask=mask)
        return losses


class StepDecoder(nn.Module):
    """Predicts a part of every step from every sample, by layers whose input is both.

    The first layer's halves for sample and step are computed once each and added in pairs.
    """

    def __init__(self, latent: int, width: int, out: int, sizes: tuple[int, ...]) -> None:
        super().__init__()
        first, *others = sizes
        self.of_latent = linear(latent, first, gain=math.sqrt(2))
        self.of_step = linear(width, first, gain=math.sqrt(2))
        self.layers = nn.Sequential(
            nn.ReLU(), *stack(first, tuple(others), "relu"), linear(sizes[-1], out, gain=1.0)
        )

    def forward(self, latent: Tensor, step: Tensor) -> Tensor:
        """(S, T, B, out) from samples (S, B, L) and steps (T, B, width)."""
        pairs = self.of_latent(latent).unsqueeze(1) + self.of_step(step)
        out: Tensor = self.layers(pairs)
        return out


class HeadDecoder(nn.Module):
    """Predicts one number of every step by a head for each entry of a one-hot vector.

    Heads depend on the sample alone: much cheaper than `StepDecoder`, where it applies.
    """

    def __init__(self, latent: int, width: int, sizes: tuple[int, ...]) -> None:
        super().__init__()
        last = sizes[-1] if sizes else latent
        self.layers = nn.Sequential(*stack(latent, sizes, "relu"), linear(last, width, gain=1.0))

    def forward(self, latent: Tensor, step: Tensor) -> Tensor:
        """(S, T, B, 1) from samples (S, B, L) and one-hot steps (T, B, width)."""
        return torch.einsum("sbw,tbw->stb", self.layers(latent), step).unsqueeze(-1)
