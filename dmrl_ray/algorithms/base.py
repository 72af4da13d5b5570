"""The contract of an algorithm: `adapt` within a trial, `collect` trials, `update` across them."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from dmrl_ray.algorithms.adaptation import Adaptation
from dmrl_ray.algorithms.gradient_adaptation import Continued
from dmrl_ray.config.schema import ContinuedTraining
from dmrl_ray.data.dataset import Dataset
from dmrl_ray.learn.descent import EPS, Descent
from dmrl_ray.learn.per_task import TaskOptimizer
from dmrl_ray.networks.actor_critic import ActorCritic
from dmrl_ray.rollout.sampler import Sampler
from dmrl_ray.tasks.distribution import TaskDistribution
from dmrl_ray.types import Arrays, Task, Trial


class Algorithm(Descent, Adaptation):
    """`collect` runs in rollout workers, `update` in learners; both own the same policy class.

    Networks that an algorithm needs beside the policy are put into ``policy.auxiliary`` when it is
    made. A learner sets what `Descent` lists before `update`; a worker sets `progress`, too.
    """

    sees_previous: bool = False
    """The policy is shown the previous action, reward and episode end."""

    frozen_statistics: bool = False
    """Updates use batch normalisation and dropout as acting does; else as training does."""

    continues_episodes: bool = False
    """Episodes go on from one collection to the next; else every collection begins afresh."""

    corrects_for_lag: bool = False
    """Updates allow for actions of an older policy, so that `max_policy_lag` may be above 0."""

    recordable: bool = True
    """What `collect` returns was played, with the rewards that the environment gave."""

    on_device: bool = False
    """`collect` works with a sampler on a device, too, whose rollouts are of tensors."""

    compiles: bool = False
    """Its losses given to `descend` read nothing that changes but the policy and the batch."""

    in_precision: bool = False
    """`update` steps through minibatches, in which `learners.precision` holds (`step_through`)."""

    network_unread: tuple[str, ...] = ()
    """Settings of the network that its policy leaves out or has as it must."""

    learns_to_act: bool = True
    """False: returns say nothing of what is learned, and the last policy counts as the best."""

    run_folder: str = ""
    """Of the run, for what earlier stages of it recorded."""

    datasets: tuple[Dataset, ...] = ()
    """What it has opened to learn from."""

    def __init__(
        self, config: Descent.Config, distribution: TaskDistribution, policy: ActorCritic
    ) -> None:
        super().__init__(config, policy)
        self.distribution = distribution

    @classmethod
    def policy_options(cls, config: Any) -> dict[str, Any]:
        """How its policy is made: what `ActorCritic` takes by keyword."""
        return {"sees_previous": cls.sees_previous}

    @property
    def collected_steps(self) -> int:
        """Steps of an environment in a collection, where no episode ends early; 0 if unknown."""
        return 0

    @property
    def asked(self) -> str | None:
        """The method by which environments say what to learn in `collect`, if one must."""
        return None

    @property
    def evaluation_episodes(self) -> int:
        """Episodes of each environment in a trial, when evaluating."""
        return self.distribution.episodes_per_trial

    def own_adaptation(self) -> Adaptation:
        """Who adapts in an online stage that leaves it to the algorithm.

        Raises:
            ValueError: the algorithm does not adapt.
        """
        if self.memory_spans_trial or type(self).adapt is not Adaptation.adapt:
            return self
        raise ValueError(
            f"by: {type(self).__name__.lower()} has no adaptation of its own; use "
            "by: {type: continued}, or evaluate its policy"
        )

    @abstractmethod
    def collect(self, sampler: Sampler, tasks: list[Task]) -> Trial:
        """The inner loop: let the policy live through, and adapt to, these tasks."""

    @abstractmethod
    def update(self, trial: Trial) -> dict[str, float]:
        """The outer loop: improve the policy from what all shards collected, as tensors."""

    def check_continued(self) -> None:
        """See that its policy can act while gradient steps move it.

        Raises:
            ValueError: it cannot.
        """

    def get_state(self) -> Arrays:
        """What the next update depends on beside weights and optimiser, such as replay."""
        return {}

    def set_state(self, state: Arrays) -> None:
        """Continue from `get_state`'s answer."""
        assert not state


def continued(
    algorithm: Algorithm, gamma: float, settings: ContinuedTraining | None = None
) -> Continued:
    """Continued training of an algorithm's policy, by its own optimiser where none is set.

    Raises:
        ValueError: as `Continued`.
    """
    algorithm.check_continued()
    config = algorithm.config
    if settings is None:
        optimizer = TaskOptimizer(
            config.optimizer,
            algorithm.learning_rate,
            config.weight_decay,
            eps=EPS,
            max_grad_norm=config.max_grad_norm,
        )
    else:
        lr = settings.lr
        optimizer = TaskOptimizer(settings.optimizer, lambda _: lr, settings.weight_decay)
    return Continued(
        algorithm.policy,
        settings or ContinuedTraining(),
        optimizer,
        gamma=gamma,
        memory_spans_trial=algorithm.memory_spans_trial,
    )
