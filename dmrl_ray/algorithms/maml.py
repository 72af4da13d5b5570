"""Model-agnostic meta-learning: parameters from which a few gradient steps suffice.

Source: Finn et al., "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks", 2017
(arXiv:1703.03400), algorithm 3. ``first_order`` gives FOMAML (section 5.2 there);
``adapt: [policy_head]`` gives ANIL (Raghu et al., 2020, arXiv:1909.09157).

The outer step is a clipped policy gradient in place of the paper's TRPO. The inner loss is an
importance-weighted surrogate (ProMP, arXiv:1810.06784, eq. 9), so that its gradient stays right
when the outer loop has moved the parameters away from those that acted. All tasks adapt in one
batched operation: parameters carry a leading task axis.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from dmrl_ray.algorithms.base import Algorithm, check_prefixes
from dmrl_ray.algorithms.task_params import (
    Parameters,
    by_task,
    fitted_advantage,
    per_task,
    task_actor,
    task_gradients,
    task_log_prob,
)
from dmrl_ray.losses.policy_gradient import ppo_clip_loss
from dmrl_ray.policy import ActorCritic
from dmrl_ray.rollout import Sampler
from dmrl_ray.tasks import TaskDistribution
from dmrl_ray.types import Rollout, Task, Trial


class MAML(Algorithm):
    """Adapt by gradient steps within a trial; improve where those steps start from."""

    class Config(Algorithm.Config):
        inner_steps: int = Field(default=1, ge=1)
        """Gradient steps taken on each task before the post-adaptation rollout."""

        inner_lr: float = Field(default=0.1, gt=0)  # Finn et al. 2017, section 5.3
        """Step size of those steps (alpha in the paper)."""

        evaluation_steps: int = Field(default=3, ge=1)
        """Gradient steps taken on each task when evaluating."""

        first_order: bool = False
        """True drops the second derivative (FOMAML): about half the memory, some bias."""

        adapt: tuple[str, ...] = ("",)
        """Prefixes of the parameter names the inner loop may change.
        ``[""]`` is everything; ``["policy_head"]`` is ANIL."""

        episodes_per_task: int = Field(default=20, ge=1)
        """Environment columns that play one task side by side, one episode each per rollout."""

        epochs: int = Field(default=4, ge=1)
        """Outer gradient steps on each batch; each adapts anew from the moved parameters."""

        clip: float = Field(default=0.3, gt=0)  # Rothfuss et al. 2019, table of hyper-parameters
        """Half-width of the outer trust interval around ratio 1."""

        gamma: float = Field(default=0.99, ge=0, le=1)
        """Discount per environment step."""

        gae_lambda: float = Field(default=1.0, ge=0, le=1)
        """0 trusts the fitted baseline, 1 the returns."""

    config: Config
    frozen_statistics = True
    corrects_for_lag = True

    def __init__(self, config: Config, distribution: TaskDistribution, policy: ActorCritic) -> None:
        super().__init__(config, distribution, policy)
        if policy.recurrent:
            raise ValueError(
                "network.encoder: gradient-based adaptation needs an encoder without memory, "
                f"found {type(policy.encoder).__name__.lower()}; use an mlp or a cnn"
            )
        check_prefixes("algorithm.adapt", config.adapt, per_task(policy, 1))

    @property
    def columns_per_task(self) -> int:
        return self.config.episodes_per_task

    @property
    def evaluation_episodes(self) -> int:
        return 1

    def collect(self, sampler: Sampler, tasks: list[Task]) -> Trial:
        return self._adapt(sampler, tasks, self.config.inner_steps)

    def evaluate(self, sampler: Sampler, tasks: list[Task]) -> Trial:
        return self._adapt(sampler, tasks, self.config.evaluation_steps)

    def update(self, trial: Trial) -> dict[str, float]:
        *support, query = trial
        tasks = query.num_tasks
        steps, skipped = [], self.skipped_batches
        for _ in range(self.config.epochs):
            params = per_task(self.policy, tasks)
            for rollout in support:
                params = self.inner_step(params, rollout, create_graph=not self.config.first_order)
            loss = self._outer_loss(params, query, tasks)
            norm = self.step_optimizer(loss)
            steps.append(torch.stack([loss.detach(), norm.detach()]))
        if self.skipped_batches == skipped:
            self.policy.update_norms(query, None)
        outer_loss, grad_norm = torch.stack(steps).mean(0).tolist()
        before, after = (float(r.reward.sum(0).mean()) for r in (support[0], query))
        return {
            "outer_loss": outer_loss,
            "grad_norm": grad_norm,
            "return/before": before,
            "return/after": after,
        }

    def inner_step(self, params: Parameters, rollout: Rollout, *, create_graph: bool) -> Parameters:
        """One gradient step on every task at once; the same in workers and learners."""
        moving = [name for name in params if name.startswith(self.config.adapt)]
        gradients = task_gradients(self.policy, params, rollout, moving, create_graph=create_graph)
        moved = {
            name: params[name] - self.config.inner_lr * gradient
            for name, gradient in gradients.items()
        }
        return params | moved

    def _adapt(self, sampler: Sampler, tasks: list[Task], steps: int) -> list[Rollout]:
        """Rollout, inner step, rollout, ...: the trial of algorithm 3, lines 5 to 8."""
        params = per_task(self.policy, len(tasks))
        sampler.begin_trial(tasks, self.policy)
        rollouts = []
        for shot in range(steps + 1):
            rollout = sampler.rollout(
                self.policy,
                self.distribution.max_episode_steps,
                actor=task_actor(self.policy, params),
                shot=shot,
                with_value=False,
                greedy=False,
            )
            rollout.advantage = fitted_advantage(
                rollout, len(tasks), gamma=self.config.gamma, gae_lambda=self.config.gae_lambda
            )
            rollouts.append(rollout)
            if shot < steps:
                tensors = rollout.map(torch.from_numpy)
                moved = self.inner_step(params, tensors, create_graph=False)
                params = {name: p.detach().requires_grad_() for name, p in moved.items()}
                sampler.begin_episodes()
        return rollouts

    def _outer_loss(self, params: Parameters, query: Rollout, num_tasks: int) -> Tensor:
        mine = slice(self.rank, num_tasks, self.world_size)
        share = len(range(num_tasks)[mine]) * self.world_size / num_tasks
        loss = ppo_clip_loss(
            task_log_prob(self.policy, params, query)[:, mine],
            by_task(query.log_prob, params)[:, mine],
            by_task(query.advantage, params)[:, mine],
            clip=self.config.clip,
        )
        return loss * share
