"""Adaptation by gradient steps, of all tasks at once.

`InnerLoop` is what MAML and Reptile have in common: its settings, how agents act between gradient
steps, and how long trials are. `Continued` continues training on each task by itself.
"""

from __future__ import annotations

from dataclasses import replace

from pydantic import Field

from dmrl_ray.algorithms.adaptation import Adaptation, Agent
from dmrl_ray.config.components import Number
from dmrl_ray.config.schema import ContinuedTraining
from dmrl_ray.learn.descent import Descent
from dmrl_ray.learn.per_task import (
    Parameters,
    TaskActor,
    TaskOptimizer,
    TaskTrainState,
    inner_advantage,
    number_of_tasks,
    per_task,
    surrogate_loss,
    task_gradients,
)
from dmrl_ray.learn.trainable import check_prefixes
from dmrl_ray.networks.actor_critic import ActorCritic
from dmrl_ray.rollout.sampler import Sampler
from dmrl_ray.tasks.distribution import TaskDistribution
from dmrl_ray.types import Rollout


class InnerLoop:
    """Acting before, between and after the gradient steps of a trial.

    Args:
        config: of the algorithm.
        distribution: of the tasks.
        policy: that all tasks start from; its actor must be differentiable in plain operations.
        rollouts: of a trial to learn from, where each is of whole episodes.

    Raises:
        ValueError: the policy has a memory that gradient steps cannot adapt, a part to adapt does
            not exist, or no gradient step fits into a trial.
    """

    class Config(Descent.Config):
        """Settings of the inner loop."""

        read_with = dict.fromkeys(
            ("inner_steps", "evaluation_steps"), ("steps_per_adaptation", (None,))
        )

        inner_steps: Number = 1
        """Gradient steps taken on each task before the post-adaptation rollout."""

        inner_lr: float = Field(default=0.1, gt=0)  # Finn et al. 2017, appendix A.2
        """Step size of those steps (alpha in the paper)."""

        evaluation_steps: Number = 3
        """Gradient steps taken on each task when evaluating."""

        trainable: tuple[str, ...] = Field(default=("",), min_length=1)
        """Prefixes of the parameter names the inner loop may change.
        ``[""]`` is everything; ``["policy_head"]`` is ANIL."""

        episodes_per_task: Number = 20
        """Environments that play one task side by side, one episode each per rollout."""

        steps_per_adaptation: Number | None = None
        """Environment steps between two gradient steps of one trial, which continues; null lets
        each gradient step follow a whole episode, after which new episodes begin. The trial's
        length says how many steps there are, and all rollouts count, not the last alone."""

        gamma: float = Field(default=0.99, ge=0, le=1)
        """Discount per environment step."""

        gae_lambda: float = Field(default=1.0, ge=0, le=1)
        """0 trusts the fitted baseline, 1 the returns."""

    def __init__(
        self, config: Config, distribution: TaskDistribution, policy: ActorCritic, *, rollouts: int
    ) -> None:
        policy.encoder.use_plain_operations()
        check_prefixes("algorithm.trainable", config.trainable, per_task(policy, 1))
        steps = config.steps_per_adaptation
        if steps is not None and steps >= distribution.trial_steps:
            raise ValueError(
                f"algorithm.steps_per_adaptation: no gradient step fits between {steps} steps and "
                f"the end of a trial of {distribution.trial_steps}; use fewer, or null"
            )
        self.config = config
        self.distribution = distribution
        self.within_trial = steps is not None  # Episodes continue over gradient steps.
        self.rollouts = rollouts
        self._actor = TaskActor(policy)

    @property
    def episodes(self) -> int:
        """Episodes of each environment in a trial to learn from."""
        return self.distribution.episodes_per_trial if self.within_trial else self.rollouts

    @property
    def evaluation_episodes(self) -> int:
        """Episodes of each environment in a trial, when evaluating."""
        within, steps = self.within_trial, self.config.evaluation_steps
        return self.distribution.episodes_per_trial if within else steps + 1

    @property
    def collected_steps(self) -> int:
        """Steps of an environment in a trial to learn from, where no episode ends early."""
        if self.within_trial:
            return self.distribution.trial_steps
        return self.rollouts * self.distribution.max_episode_steps

    def rounds(self, episodes: int) -> list[int]:
        """Episodes of each environment between resets of all of them together."""
        return [episodes] if self.within_trial else [1] * episodes

    def act(self, sampler: Sampler, agent: Agent) -> Rollout:
        """Act under the agent's parameters, of each task, until the next gradient step."""
        config = self.config
        if agent.adaptation_step.any():  # Acting needs no graph of the steps so far.
            agent.state = leaves(agent.state)
        return act_per_task(
            self._actor,
            sampler,
            agent,
            agent.state,
            num_steps=config.steps_per_adaptation,
            gamma=config.gamma,
            gae_lambda=config.gae_lambda,
        )


class Continued(Adaptation):
    """Training continues, on each task by itself: a policy-gradient step after every round.

    It adapts any policy whose actor is differentiable in plain operations.

    Args:
        policy: that every task starts from.
        settings: of the rounds, and of the parts that are trainable.
        optimizer: of the steps.
        gamma: discount of the returns.
        memory_spans_trial: of the policy.

    Raises:
        ValueError: the policy has a memory that gradient steps cannot adapt, or a trainable part
            does not exist.
    """

    acts_greedily = False

    def __init__(
        self,
        policy: ActorCritic,
        settings: ContinuedTraining,
        optimizer: TaskOptimizer,
        *,
        gamma: float,
        memory_spans_trial: bool,
    ) -> None:
        policy.encoder.use_plain_operations()
        check_prefixes("by.trainable", settings.trainable, per_task(policy, 1))
        self.policy = policy
        self.settings = settings
        self.optimizer = optimizer
        self.gamma = gamma
        self.memory_spans_trial = memory_spans_trial
        self._actor = TaskActor(policy)

    @property
    def envs_per_task(self) -> int:
        return self.settings.episodes

    def initial_state(self, sampler: Sampler, num_tasks: int) -> TaskTrainState:
        return TaskTrainState(per_task(self.policy, num_tasks))

    def rounds(self, episodes: int) -> list[int]:
        return [1] * episodes

    def act(self, sampler: Sampler, agent: Agent) -> Rollout:
        params = agent.state.params
        return act_per_task(self._actor, sampler, agent, params, gamma=self.gamma, gae_lambda=1.0)

    def adapt(self, state: TaskTrainState, experience: Rollout) -> TaskTrainState:
        """One gradient step on every task at once."""
        loss = surrogate_loss(self.policy, state.params, experience)
        return self.step(state, task_gradients(loss, state.params, self.settings.trainable))

    def step(self, state: TaskTrainState, gradients: Parameters) -> TaskTrainState:
        """One step of the optimiser along these gradients, within the parameters' bounds."""
        stepped = self.optimizer.step(state, gradients)
        bounds = self.policy.bounds
        bounded = {n: stepped.params[n].clamp(*bounds[n]) for n in gradients if n in bounds}
        return replace(stepped, params=leaves(stepped.params | bounded))


def act_per_task(
    actor: TaskActor,
    sampler: Sampler,
    agent: Agent,
    params: Parameters,
    *,
    num_steps: int | None = None,
    gamma: float,
    gae_lambda: float,
) -> Rollout:
    """Act under every task's own parameters, with the advantages that a gradient step needs."""
    if sampler.fresh:
        agent.history = []
    rollout = sampler.rollout(
        actor.policy,
        num_steps,
        actor=actor.under(params),
        adaptation_step=agent.adaptation_step,
        with_value=False,
        greedy=False,
    )
    agent.history.append(rollout)
    rollout.advantage = inner_advantage(
        agent.history, number_of_tasks(params), gamma=gamma, gae_lambda=gae_lambda
    )
    return rollout


def leaves(params: Parameters) -> Parameters:
    """The same numbers, with gradients of their own."""
    return {name: p.detach().requires_grad_() for name, p in params.items()}
