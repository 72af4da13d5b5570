"""Model-agnostic meta-learning: parameters from which a few gradient steps suffice.

Source: Finn et al., "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks", 2017
(arXiv:1703.03400), algorithm 3, whose lines stand beside the steps here. ``first_order`` gives
FOMAML (section 5.2 there); ``trainable: [policy_head]`` gives ANIL (Raghu et al., 2020,
arXiv:1909.09157); ``outer: trpo`` is the paper's outer step, for which a clipped policy gradient
stands in by default. The inner loss is weighted by importance (Rothfuss et al. 2019,
arXiv:1810.06784, eq. 9), so that its gradient stays right in later outer steps on a batch.

A trial is a list of rollouts: supports, each followed by a gradient step, and the query. With
``steps_per_adaptation`` one trial continues over the gradient steps, and every
rollout enters the outer loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar, Literal, TypeAlias

import torch
from pydantic import Field
from torch import Tensor

from dmrl_ray.algorithms.adaptation import Agent
from dmrl_ray.algorithms.base import Algorithm
from dmrl_ray.algorithms.gradient_adaptation import InnerLoop
from dmrl_ray.config.components import Number
from dmrl_ray.learn.descent import Descent
from dmrl_ray.learn.per_task import (
    Parameters,
    by_task,
    descend_over_tasks,
    per_task,
    surrogate_loss,
    task_gradients,
    task_mask,
    trial_log_prob,
    trial_mask,
    trial_pi,
)
from dmrl_ray.learn.trust_region import trust_region_step
from dmrl_ray.losses.averages import counted_mean
from dmrl_ray.losses.policy_gradient import likelihood_ratio_loss, ppo_clip_loss
from dmrl_ray.losses.returns import fitted_trial_advantage
from dmrl_ray.networks.actor_critic import ActorCritic
from dmrl_ray.rollout.sampler import Sampler
from dmrl_ray.tasks.distribution import TaskDistribution
from dmrl_ray.types import Rollout, Task, Trial

MetaLoss: TypeAlias = Callable[..., tuple[Tensor, list[Parameters]]]
"""A function of a trial and tensors (T, B, ...): the outer loss and the adapted parameters."""


class MAML(Algorithm):
    """Adapt by gradient steps within a trial; improve where those steps start from."""

    class Config(InnerLoop.Config):
        read_with: ClassVar = {
            "epochs": ("outer", ("clip",)),
            "clip": ("outer", ("clip",)),
            "max_kl": ("outer", ("trpo",)),
            "outer_gamma": ("steps_per_adaptation", ()),
            **dict.fromkeys(Descent.Config.model_fields, ("outer", ("clip", "vpg"))),
        }

        first_order: bool = False
        """True drops the second derivative (FOMAML): about half the memory, some bias."""

        outer: Literal["clip", "trpo", "vpg"] = "clip"
        """The outer step: clipped policy gradient, trust region, or plain policy gradient."""

        epochs: Number = 4
        """Outer gradient steps on each batch where they are clipped, else one; each adapts again
        from the parameters that the last one led to."""

        clip: float = Field(default=0.3, gt=0)  # Rothfuss et al. 2019, appendix D
        """Clipping parameter epsilon of the outer step."""

        max_kl: float = Field(default=0.01, gt=0)  # as in the authors' code
        """Nats by which a trust-region step may move the adapted policies; it has no lr."""

        outer_gamma: float = Field(default=0.99, ge=0, le=1)
        """Discount of rewards of later rollouts of a trial, where it continues
        (`steps_per_adaptation`): exploring early is rewarded late, and `gamma` is the inner
        loop's."""

    config: Config
    frozen_statistics = True
    acts_greedily = False
    corrects_for_lag = True
    on_device = True
    compiles = True

    def __init__(
        self,
        config: Config,
        distribution: TaskDistribution,
        policy: ActorCritic,
        *,
        outer_parts: tuple[str, ...] = ("",),
    ) -> None:
        super().__init__(config, distribution, policy)
        self.inner_loop = InnerLoop(config, distribution, policy, rollouts=config.inner_steps + 1)
        self.outer_parts = outer_parts  # Prefixes of the parameters that the outer loop moves.
        # The rollouts of a trial that the outer loss is of.
        self.query = slice(None) if self.inner_loop.within_trial else slice(-1, None)

    def adapt(
        self, params: Parameters, support: Rollout, *, create_graph: bool = False
    ) -> Parameters:
        """theta'_i = theta - alpha * gradient of L_i(theta), of every task i at once."""
        loss = surrogate_loss(self.policy, params, support)  # (N,), eq. 4
        gradients = task_gradients(  # line 6
            loss, params, self.config.trainable, create_graph=create_graph
        )
        alpha = self.config.inner_lr
        return params | {name: params[name] - alpha * g for name, g in gradients.items()}  # line 7

    def collect(self, sampler: Sampler, tasks: list[Task]) -> Trial:
        """Act on every task with theta (line 5), `adapt`, and act with theta'_i (line 8)."""
        agent = self.begin(sampler, tasks)
        return list(self.play(sampler, agent, self.inner_loop.episodes))

    def update(self, trial: Trial) -> dict[str, float]:
        """theta <- theta - beta * gradient of the mean of L_i(theta'_i) (line 10, with a sum)."""
        return self.outer_step(self.meta_loss, trial, self.outer_advantage(trial))

    def meta_loss(self, trial: Trial, advantage: Tensor) -> tuple[Tensor, list[Parameters]]:
        """The mean over tasks of L_i(theta'_i) as a function of theta, and all theta'_i."""
        adapted_params = self.adapted_params(trial)
        loss = self.outer_loss(adapted_params, trial, advantage)
        return loss.mean(), adapted_params  # (N,) -> ()

    def adapted_params(self, trial: Trial) -> list[Parameters]:
        """The parameters of each rollout, as functions of those that all tasks start from.

        These are the steps that the worker took between the rollouts, taken again.
        """
        params = [per_task(self.policy, trial[0].num_tasks)]
        for support in trial[:-1]:
            graph = not self.config.first_order  # else the second derivative is left out
            params.append(self.adapt(params[-1], support, create_graph=graph))
        return params

    def outer_loss(
        self, adapted_params: list[Parameters], trial: Trial, advantage: Tensor
    ) -> Tensor:
        """(N,) the tasks' losses L_i(theta'_i) on the query, each step of a task weighing the same.

        Args:
            adapted_params: of each rollout.
            trial: of the same tasks.
            advantage: (T, B) of the steps of the query, as `outer_advantage`.
        """
        query, params = trial[self.query], adapted_params[self.query]
        log_prob = trial_log_prob(self.policy, params, query)  # (T, N, E)
        behaviour_log_prob = by_task(torch.cat([r.log_prob for r in query]), params[0])
        tensors = log_prob, behaviour_log_prob, by_task(advantage, params[0])
        mask = task_mask(query, params[0])
        if self.config.outer == "clip":
            return ppo_clip_loss(*tensors, clip=self.config.clip, mask=mask, dim=(0, 2))
        return likelihood_ratio_loss(*tensors, mask=mask, dim=(0, 2))

    def outer_advantage(self, trial: Trial) -> Tensor:
        """(T, B) of the query, over all of its rollouts one after the other."""
        if not self.inner_loop.within_trial:
            return trial[-1].advantage
        return fitted_trial_advantage(
            torch.cat([rollout.reward for rollout in trial]),
            gamma=self.config.outer_gamma,
            gae_lambda=self.config.gae_lambda,
            mask=trial_mask(trial),
        )

    def outer_step(self, loss: MetaLoss, trial: Trial, *tensors: Tensor) -> dict[str, float]:
        """Move theta along the gradient of a loss of this trial and tensors (T, B, ...)."""
        skipped = self.skipped_batches
        if self.config.outer == "trpo":
            metrics = self._trust_region(loss, trial, *tensors)
        else:
            metrics = descend_over_tasks(
                self,
                lambda *batch: loss(*batch)[0],
                trial,
                *tensors,
                steps=self.config.epochs if self.config.outer == "clip" else 1,
                parts=self.outer_parts,
            )
        if self.skipped_batches == skipped:
            rows = [rollout.counted(rollout.obs[:-1]) for rollout in trial[self.query]]
            self.policy.update_obs_norm(torch.cat(rows))
        before, after = (rollout.mean_return() for rollout in (trial[0], trial[-1]))
        return metrics | {"return/before": before, "return/after": after}

    def _trust_region(self, loss: MetaLoss, trial: Trial, *tensors: Tensor) -> dict[str, float]:
        """Computed on all tasks by every learner: line searches cannot be averaged."""
        query = trial[self.query]
        old_pi = trial_pi(self.policy, self.adapted_params(trial)[self.query], query).detach()

        def objective() -> tuple[Tensor, Tensor]:
            value, adapted_params = loss(trial, *tensors)
            pi = trial_pi(self.policy, adapted_params[self.query], query)
            kl = self.policy.policy_head.kl(old_pi, pi)
            return value, counted_mean(kl, task_mask(query, adapted_params[0]))

        named = zip(self.names, self.parameters, strict=True)
        moving = [parameter for name, parameter in named if name.startswith(self.outer_parts)]
        metrics = trust_region_step(moving, objective, max_kl=self.config.max_kl)
        self.policy.project()
        if math.isnan(metrics["grad_norm"]):
            self.skipped_batches += 1
        return metrics

    @property
    def envs_per_task(self) -> int:
        return self.config.episodes_per_task

    @property
    def collected_steps(self) -> int:
        return self.inner_loop.collected_steps

    @property
    def evaluation_episodes(self) -> int:
        return self.inner_loop.evaluation_episodes

    def initial_state(self, sampler: Sampler, num_tasks: int) -> Parameters:
        return per_task(self.policy, num_tasks)

    def rounds(self, episodes: int) -> list[int]:
        return self.inner_loop.rounds(episodes)

    def act(self, sampler: Sampler, agent: Agent) -> Rollout:
        return self.inner_loop.act(sampler, agent)
