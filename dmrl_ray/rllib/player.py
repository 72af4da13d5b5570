"""Evaluates an `RLModule` with `Sampler`: all tasks in parallel, with the usual episode rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import torch
from ray.rllib.core.columns import Columns
from torch import Tensor

from dmrl_ray.networks.actor_critic import ActorCritic, Previous
from dmrl_ray.networks.base import Memory, select_memory
from dmrl_ray.rllib.observations import ObservationBuilder
from dmrl_ray.rollout.sampler import Sampler
from dmrl_ray.types import Task


class ModulePolicy:
    """Adapts an `RLModule` to the interface of a policy in `Sampler`.

    Its ``pi`` is the action that the module has sampled; it is also its own policy head, which
    returns ``pi`` as action.

    Args:
        module: the module, on the CPU.
        observe: the observations that it was trained on.
        greedy: act without exploration, as in RLlib's evaluation.
    """

    value_encoder = None

    def __init__(self, module: Any, observe: ObservationBuilder, *, greedy: bool) -> None:
        self._module, self._observe, self._greedy = module, observe, greedy
        self._state: dict[str, Any] = module.get_initial_state() if module.is_stateful() else {}
        self.recurrent = bool(self._state)
        self.sees_previous = True

    @property
    def policy_head(self) -> ModulePolicy:
        """The policy itself."""
        return self

    def initial_memory(self, num: int) -> Memory:
        """Returns the initial state of the module, each leaf (B, ...)."""
        leaves = map(torch.as_tensor, _leaves(self._state))
        return tuple(leaf.expand(num, *leaf.shape).clone() for leaf in leaves)

    def __call__(
        self, obs: Tensor, previous: Previous | None, memory: Memory, reset: Tensor | None
    ) -> tuple[Tensor, Tensor, Memory]:
        """Returns actions (1, B, ...) of one step, twice, and the memory."""
        assert previous is not None
        if reset is not None:
            memory = select_memory(reset[0], self.initial_memory(obs.shape[1]), memory)
        batch: dict[str, Any] = {Columns.OBS: self._observation(obs[0].numpy(), previous)}
        if self.recurrent:  # RLlib's sequences are (B, T, ...).
            batch[Columns.OBS] = batch[Columns.OBS].unsqueeze(1)
            batch[Columns.STATE_IN] = _like(self._state, iter(memory))
        action, out = self._act(batch)
        if self.recurrent:
            action = action.squeeze(1)
            memory = tuple(_leaves(out[Columns.STATE_OUT]))
        return action.unsqueeze(0), action, memory

    def noise(self, rng: np.random.Generator, num_steps: int, num_envs: int) -> Tensor:
        """Returns no noise: the module samples by itself, seeded by `play`."""
        return torch.empty(num_steps, 0)

    def mode(self, pi: Tensor) -> Tensor:
        """Returns the action."""
        return pi

    def sample(self, pi: Tensor, noise: Tensor) -> Tensor:
        """Returns the action."""
        return pi

    def log_prob(self, pi: Tensor, action: Tensor) -> Tensor:
        """Returns 0: log-probabilities are unknown, as DQN has none."""
        return torch.zeros(pi.shape[:2])

    def _observation(self, obs: np.ndarray, previous: Previous) -> Tensor:
        action, reward, done = (part[0].numpy() for part in previous)
        if action.dtype.kind == "f":
            action = np.clip(action, -1.0, 1.0)
        return torch.from_numpy(self._observe(obs, action, reward, done))

    def _act(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        module = self._module
        if self._greedy:
            out, kind = module.forward_inference(batch), "inference"
        else:
            out, kind = module.forward_exploration(batch, t=2**62), "exploration"
        if Columns.ACTIONS in out:
            return out[Columns.ACTIONS], out
        distribution = getattr(module, f"get_{kind}_action_dist_cls")()
        pi = distribution.from_logits(out[Columns.ACTION_DIST_INPUTS])
        return (pi.to_deterministic() if self._greedy else pi).sample(), out


def _leaves(state: dict[str, Any]) -> Iterator[Any]:
    """Yields the leaves of a nested state, sorted by name."""
    for name in sorted(state):
        part = state[name]
        yield from _leaves(part) if isinstance(part, dict) else (part,)


def _like(state: dict[str, Any], leaves: Iterator[Tensor]) -> dict[str, Any]:
    """Returns a state of the same structure with other leaves."""
    return {
        name: _like(state[name], leaves) if isinstance(state[name], dict) else next(leaves)
        for name in sorted(state)
    }


def play(
    module: Any,
    observe: ObservationBuilder,
    sampler: Sampler,
    tasks: list[Task],
    *,
    greedy: bool,
    seed: int,
) -> None:
    """Runs one trial on each task; the episodes are in the sampler afterwards."""
    policy = cast(ActorCritic, ModulePolicy(module, observe, greedy=greedy))
    episodes = sampler.distribution.episodes_per_trial
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sampler.begin_trial(tasks, policy, episodes)
        sampler.rollout(policy, with_value=False)
