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

    What an algorithm can do is said by the attributes below, which workers, learners and checks
    read; a subclass sets those that differ. That its memory spans the trial and that it acts
    greedily stand in `Adaptation`; whether it has steps of `adapt`, minibatches and schedules is
    read from its methods and its Config.
    """

    continues_episodes: bool = False
    """Episodes continue from one collection to the next; else each begins with a reset."""

    corrects_for_lag: bool = False
    """Updates correct for actions of an older policy, so that `max_policy_lag` may be above 0."""

    on_device: bool = False
    """`collect` works with a sampler on a device, too, whose rollouts are of tensors."""

    recordable: bool = True
    """Steps that `collect` returns were played, with the rewards that the environment gave."""

    compiles: bool = False
    """Its losses given to `descend` read nothing that changes but the policy and the batch."""

    frozen_statistics: bool = False
    """Updates use batch normalisation and dropout as acting does; else as training does."""

    learns_to_act: bool = True
    """False: returns say nothing of what is learned, and the last policy counts as the best."""

    network_unread: tuple[str, ...] = ()
    """Settings of the network that its policy leaves out or has as it must."""

    run_folder: str = ""
    """Folder of the run, in which earlier stages recorded."""

    datasets: tuple[Dataset, ...] = ()
    """The datasets that it has opened."""

    def __init__(
        self, config: Descent.Config, distribution: TaskDistribution, policy: ActorCritic
    ) -> None:
        super().__init__(config, policy)
        self.distribution = distribution

    @classmethod
    def policy_options(cls, config: Any) -> dict[str, Any]:
        """The arguments by keyword that its policy is made with.

        A policy whose memory spans the trial observes the previous action, reward and episode end:
        the task is to be found out from them.
        """
        return {"sees_previous": cls.memory_spans_trial}

    @classmethod
    def has_adaptation_steps(cls) -> bool:
        """Whether `adapt` changes the state by a call; else memory adapts in the forward pass."""
        return cls.adapt is not Adaptation.adapt

    @property
    def takes_minibatches(self) -> bool:
        """Whether `update` steps through minibatches, in which `learners.precision` holds."""
        return "minibatches" in type(self.config).model_fields

    @property
    def collected_steps(self) -> int:
        """Steps of an environment in a collection, where no episode ends early; 0 if unknown."""
        return 0

    @property
    def label_method(self) -> str | None:
        """The environments' method that labels steps in `collect`, if one must be there."""
        return None

    @property
    def evaluation_episodes(self) -> int:
        """Episodes of each environment in a trial, when evaluating."""
        return self.distribution.episodes_per_trial

    def own_adaptation(self) -> Adaptation:
        """The adaptation of an online stage that leaves it to the algorithm.

        Raises:
            ValueError: the algorithm does not adapt.
        """
        if self.memory_spans_trial or self.has_adaptation_steps():
            return self
        raise ValueError(
            f"by: {type(self).__name__.lower()} has no adaptation of its own; use "
            "by: {type: continued}, or evaluate its policy"
        )

    @abstractmethod
    def collect(self, sampler: Sampler, tasks: list[Task]) -> Trial:
        """The inner loop: let the policy act on these tasks, and adapt to them."""

    @abstractmethod
    def update(self, trial: Trial) -> dict[str, float]:
        """The outer loop: improve the policy from what all shards collected, as tensors."""

    def check_continued(self) -> None:
        """Check that its policy can act while gradient steps move it.

        Raises:
            ValueError: it cannot.
        """

    def get_state(self) -> Arrays:
        """State that the next update depends on beside weights and optimiser, such as replay."""
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
