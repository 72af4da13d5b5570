"""The policy: the actor-critic that joins normalisation, encoder and heads.

One forward serves acting (T = 1) and learning. Inputs are (T, B, ...); a policy's memory is a
tuple of tensors (B, ...), empty for encoders without memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import gymnasium as gym
import numpy as np
import torch
from gymnasium.spaces import Box
from pydantic import Field
from torch import Tensor, nn

from dmrl_ray.config.schema import LARGEST_SIZE, Component, Settings
from dmrl_ray.networks.base import Encoder, Memory, linear
from dmrl_ray.networks.heads import (
    LOG_STD_BOUNDS,
    CategoricalHead,
    GaussianHead,
    SquashedGaussianHead,
    exactly,
)
from dmrl_ray.networks.norm import RunningNorm
from dmrl_ray.tasks.spaces import Packed, scaled_columns
from dmrl_ray.types import Array, Rollout

OBS_BOUND = 10.0
"""Standard deviations at which scaled observations are clipped; value targets never are."""

Previous: TypeAlias = tuple[Tensor, Tensor, Tensor]
"""Previous action, reward and done, each (T, B, ...)."""


class ActorCritic(nn.Module):
    """Policy and value function over one encoder, or one each.

    `auxiliary` is for networks that an algorithm adds, such as decoders and critics of its own:
    they travel with the weights, but another algorithm may start from the rest without them.

    Args:
        sees_previous: the previous action, reward and episode end join the input.
        latent: width of a vector that joins the input of each environment, such as a latent task.
        squashed: continuous actions are squashed into their box, with a standard deviation that
            depends on the observation; else they are clipped there.

    Normalisation statistics are buffers: they travel with the weights, and only the learner
    updates them, after its gradient steps, so that a policy version means one function.
    """

    class Config(Settings):
        encoder: Component = Component(type="mlp")
        """Network between observation and heads."""

        separate_value: bool | None = None
        """Give the value function an encoder of its own; null does so for encoders without
        memory only."""

        critic_only: tuple[str, ...] = ()
        """Parts of the observation that the value function alone sees, such as ``[task]``: it is
        not needed to act, and knows more with them (Pinto et al. 2017, arXiv:1710.06542)."""

        blind_to: tuple[Literal["action", "reward", "done"], ...] = ()
        """Parts of the previous step that are hidden from a policy that observes it."""

        context: int = Field(default=0, ge=0, le=LARGEST_SIZE)
        """Width of a vector of parameters that joins the input: what CAVIA adapts."""

        squashed: bool = False
        """Squash continuous actions into their box, with a standard deviation that depends on the
        observation, as sac and pearl always do; else they are clipped, with one for all."""

        normalize_obs: bool = True
        """Scale observations by their running mean and deviation (never images)."""

        normalize_value: bool = True
        """Predict returns in units of their running mean and deviation."""

    def __init__(
        self,
        config: Config,
        obs_space: Box,
        action_space: gym.Space[Any],
        *,
        sees_previous: bool,
        latent: int = 0,
        squashed: bool = False,
    ) -> None:
        super().__init__()
        if isinstance(action_space, gym.spaces.Discrete):
            actions = int(action_space.n)
        else:
            actions = math.prod(action_space.shape or ())
        if config.blind_to and not sees_previous:
            raise ValueError(
                "network.blind_to: a policy of this algorithm does not observe its previous step; "
                "leave it out"
            )
        extra = config.context + latent + (actions + 2 if sees_previous else 0)
        self.latent = latent
        self.sees_previous = sees_previous
        self.blind_to = config.blind_to
        self.is_image = obs_space.dtype == np.uint8
        actor_space = self._split(obs_space, config.critic_only)
        build = config.encoder.load()
        self.encoder: Encoder = build(config.encoder.settings, actor_space, extra)
        self.recurrent = bool(self.encoder.initial_memory(1))
        separate = config.separate_value
        if separate is None:
            separate = not self.recurrent
        self.value_encoder: Encoder | None = None
        if separate:
            self.value_encoder = build(config.encoder.settings, obs_space, extra)
        discrete = isinstance(action_space, gym.spaces.Discrete)
        if discrete and config.squashed:
            raise ValueError("network.squashed: actions are discrete; leave it out")
        squashed = squashed or config.squashed
        head = CategoricalHead if discrete else SquashedGaussianHead if squashed else GaussianHead
        self.policy_head: CategoricalHead | GaussianHead | SquashedGaussianHead = head(
            self.encoder.action_layer(2 * actions if squashed and not discrete else actions),
            actions,
        )
        if self.hidden is None or separate:
            self.value_head: nn.Module = linear(self.encoder.out_dim, 1, gain=1.0)
        else:  # What a hidden part means depends on what the memory holds: one layer is too few.
            layer = linear(self.encoder.out_dim + len(self.hidden), 128, gain=math.sqrt(2))
            self.value_head = nn.Sequential(layer, nn.ReLU(), linear(128, 1, gain=1.0))
        self.context = nn.Parameter(torch.zeros(config.context)) if config.context else None
        self.auxiliary = nn.ModuleDict()
        scaled = config.normalize_obs and scaled_columns(obs_space).any()
        self.obs_norm = RunningNorm(obs_space.shape) if scaled else None
        self.value_norm = RunningNorm(()) if config.normalize_value else None

    def _split(self, space: Box, critic_only: tuple[str, ...]) -> Box:
        """The actor's part of the observation; where it is not all, `seen` and `hidden` say."""
        self.seen: Tensor | None
        self.hidden: Tensor | None
        self.scaled: Tensor | None
        mask = scaled_columns(space)
        tensors = dict.fromkeys(("seen", "hidden", "scaled"))
        if not mask.all() and mask.any():
            tensors["scaled"] = torch.from_numpy(mask)
        actor_space = space
        if critic_only:
            if not isinstance(space, Packed):
                raise ValueError(
                    "network.critic_only: the observations have no named parts; "
                    "show the task with tasks: {type: observe, ...}"
                )
            actor_space = space.without(critic_only)
            hidden = space.columns(critic_only)
            tensors["hidden"] = torch.from_numpy(hidden)
            tensors["seen"] = torch.from_numpy(np.setdiff1d(np.arange(space.shape[0]), hidden))
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)
        return actor_space

    def initial_memory(self, num: int) -> Memory:
        """The actor's memory before the first step of a trial."""
        return self.encoder.initial_memory(num)

    def forward(
        self,
        obs: Tensor,
        previous: Previous | None = None,
        memory: Memory = (),
        reset: Tensor | None = None,
        latent: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Memory]:
        """The actor: distribution parameters (T, B, P), features (T, B, H) and memory.

        `latent` (T, B, L) is zero where it is not given.
        """
        x = self.actor_input(obs)
        features, memory = self.encoder(x, self.extra(previous, obs, latent), memory, reset)
        return exactly(self.policy_head, features), features, memory

    def value(
        self,
        features: Tensor | None,
        obs: Tensor,
        previous: Previous | None = None,
        reset: Tensor | None = None,
    ) -> Tensor:
        """The critic, in units of `value_norm`: (T, B).

        It reads the actor's `features` where the encoder is shared (computing them from `obs`
        if None). With an encoder of its own that has memory, `obs` must be a whole trial.
        """
        if self.value_encoder is None:
            if features is None:
                extra = self.extra(previous, obs)
                features = self.encoder(self.actor_input(obs), extra, (), None)[0]
            if self.hidden is not None:
                features = torch.cat([features, self.scale(obs)[..., self.hidden]], -1)
        else:
            memory = self.value_encoder.initial_memory(obs.shape[1])
            memory = tuple(leaf.to(obs.device) for leaf in memory)
            extra = self.extra(previous, obs)
            features = self.value_encoder(self.scale(obs), extra, memory, reset)[0]
        return exactly(self.value_head, features).squeeze(-1)

    def bootstrap_value(self, inputs: Sequence[Array], memory: Memory) -> Tensor:
        """Values (N,) of observations that no action follows, in units of `value_norm`.

        Args:
            inputs: (N, ...) observations, resets, previous actions, rewards and dones.
            memory: leaves (N, ...), before those observations.
        """
        obs, reset, action, reward, done = (torch.as_tensor(x).unsqueeze(0) for x in inputs)
        _, features, _ = self(obs, mask_previous(action, reward, done, reset), memory, reset)
        return self.value(features, obs)[0]

    def denormalize_value(self, value: Tensor) -> Tensor:
        """From the critic's units to returns."""
        return value if self.value_norm is None else self.value_norm.denormalize(value)

    def normalize_value(self, value: Tensor) -> Tensor:
        """From returns to the critic's units."""
        return value if self.value_norm is None else self.value_norm.normalize(value)

    @property
    def bounds(self) -> dict[str, tuple[float, float]]:
        """Between what some of its parameters stay, by their names."""
        gaussian = isinstance(self.policy_head, GaussianHead)
        return {"policy_head.log_std": LOG_STD_BOUNDS} if gaussian else {}

    @torch.no_grad()
    def project(self) -> None:
        """Put parameters that left their bounds back on them, where gradients still pass."""
        for name, bounds in self.bounds.items():
            self.get_parameter(name).clamp_(*bounds)

    def update_norms(self, rollout: Rollout, value_target: Tensor | None) -> None:
        """Update the statistics with a rollout; the learner calls it after its gradient steps."""
        self.update_obs_norm(rollout.counted(rollout.obs[:-1]))
        if value_target is not None:
            self.update_value_norm(rollout.counted(value_target))

    def begin_value_norm(self, target: Tensor) -> bool:
        """Update with the first value targets before any gradient step; returns whether it did.

        In units of an untrained norm, large targets would drown the policy's gradient.
        """
        norm = self.value_norm
        if norm is None or norm.batches.item() > 0:
            return False
        self.update_value_norm(target.flatten())
        return norm.batches.item() > 0

    @torch.no_grad()
    def update_value_norm(self, target: Tensor) -> None:
        """Update with value targets (N,), and leave every value as it is.

        The last layer makes up for the new scale (PopArt, van Hasselt et al. 2016,
        arXiv:1602.07714, eq. 6). Values that moved with it would move the next targets, which
        bootstrap from them, and so the scale, without end. The first scale replaces none: adopting
        it is better than keeping the values of an untrained critic.
        """
        norm = self.value_norm
        head = self.value_head
        layer = head[-1] if isinstance(head, nn.Sequential) else head
        if norm is None or not layer.weight.requires_grad:
            return
        assert isinstance(layer, nn.Linear)
        first, mean, std = norm.batches.item() == 0, norm.mean.clone(), norm.std
        norm.update(target)
        if not first:
            layer.weight.mul_(std / norm.std)
            layer.bias.mul_(std).add_(mean - norm.mean).div_(norm.std)

    def update_obs_norm(self, obs: Tensor) -> None:
        """Update with observations (N, ...), as `update_norms` does.

        The input of frozen layers stays scaled as it is: they would no longer be the same function.
        """
        frozen = not all(p.requires_grad for p in self.encoder.parameters())
        if self.obs_norm is not None and not frozen:
            self.obs_norm.update(obs)

    def scale(self, obs: Tensor) -> Tensor:
        """(..., *obs_shape) observations in units that networks read."""
        if self.is_image:
            return obs.to(torch.float32) / 255.0
        if self.obs_norm is None:
            return obs
        scaled = self.obs_norm.normalize(obs).clamp(-OBS_BOUND, OBS_BOUND)
        return scaled if self.scaled is None else torch.where(self.scaled, scaled, obs)

    def actor_input(self, obs: Tensor) -> Tensor:
        """(T, B, ...) observations as the actor's encoder reads them."""
        x = self.scale(obs)
        return x if self.seen is None else x[..., self.seen]

    def extra(
        self, previous: Previous | None, obs: Tensor, latent: Tensor | None = None
    ) -> Tensor | None:
        """(T, B, ...) what joins them: the previous step, the context and the latent."""
        parts = []
        if self.sees_previous:
            assert previous is not None
            action, reward, done = previous
            observed = {
                "action": self.policy_head.encode(action),
                "reward": reward.unsqueeze(-1),
                "done": done.to(reward.dtype).unsqueeze(-1),
            }
            parts += [
                torch.zeros_like(x) if name in self.blind_to else x for name, x in observed.items()
            ]
        if self.context is not None:
            parts.append(self.context.expand(*obs.shape[:2], -1))
        if self.latent:
            nothing = torch.zeros(*obs.shape[:2], self.latent, device=obs.device)
            parts.append(nothing if latent is None else latent)
        return torch.cat(parts, -1) if parts else None


def mask_previous(action: Tensor, reward: Tensor, done: Tensor, reset: Tensor) -> Previous:
    """Nothing came before a reset: action none (-1, or zeros), reward 0, done true."""
    none = -1 if action.dtype == torch.int64 else 0
    mask = reset if action.dim() == reset.dim() else reset.unsqueeze(-1)
    return action.masked_fill(mask, none), reward.masked_fill(reset, 0.0), done | reset


def previous_inputs(rollout: Rollout) -> Previous:
    """The policy's inputs from the step before each step of a rollout: tensors (T, B, ...)."""
    done = rollout.terminated | rollout.truncated
    before = (rollout.previous_action, rollout.previous_reward, rollout.previous_done)
    during = (rollout.action, rollout.reward, done)
    action, reward, done = (
        torch.cat([b.unsqueeze(0), x[:-1]]) for b, x in zip(before, during, strict=True)
    )
    return mask_previous(action, reward, done, rollout.reset)
