"""A job's specification, and the program that is built from it in workers and learners."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from dmrl_ray.algorithms.adaptation import Adaptation
from dmrl_ray.algorithms.base import Algorithm, continued
from dmrl_ray.config.components import SHORT_NAMES, import_class
from dmrl_ray.config.schema import (
    RLLIB,
    By,
    Component,
    EnvironmentSettings,
    Finetune,
    Pretrain,
    RolloutSettings,
    RunConfig,
    resolve_auto,
)
from dmrl_ray.errors import ConfigError
from dmrl_ray.networks.actor_critic import ActorCritic
from dmrl_ray.rollout.device_sampler import DeviceSampler
from dmrl_ray.rollout.sampler import Sampler
from dmrl_ray.tasks.activity import CODES, during
from dmrl_ray.tasks.distribution import TaskDistribution, TaskVectorEnv
from dmrl_ray.tasks.faults import (
    RAISED,
    answer_of,
    check_spaces,
    contain_exit,
    fault,
    name_of,
    sample,
)
from dmrl_ray.types import SPLITS, Arrays, EnvironmentFault, Split, Task, random_stream, storable


@dataclass(frozen=True)
class JobSpec:
    """One training or evaluation job; small, and sent to every process that takes part in it."""

    stage: str
    name: str  # unique within the stage; equals the stage's name where it has one job
    seed: int  # of the whole run
    tasks: Component
    network: Component
    algorithm: Component
    rollout: RolloutSettings
    environments: EnvironmentSettings = field(default_factory=EnvironmentSettings)
    evaluation_seed: int = 0  # the same for all runs of a study
    env_steps: int = 0  # the budget, for schedules ...
    updates: int = 0  # ... which is in updates where this is not 0
    split: Split = "train"
    fixed_tasks: tuple[Task, ...] = ()  # instead of tasks drawn from the split
    trainable: tuple[str, ...] = ("",)
    learner_threads: int = 1
    precision: str = "float32"
    compile: bool = False
    device: str = "cpu"
    record: bool = False  # every step is a row of the transitions table
    run_folder: str = ""  # where algorithms find what earlier stages recorded

    @property
    def key(self) -> tuple[int | str, ...]:
        """Begins the key of every random stream of this job."""
        return (self.stage, self.name)

    def spent(self, updates: int, env_steps: int) -> float:
        """Share of the budget that is spent after so many updates and steps: 0 to 1."""
        done, budget = (updates, self.updates) if self.updates else (env_steps, self.env_steps)
        return min(1.0, done / max(1, budget))

    @property
    def algorithm_name(self) -> str:
        """As it stands in the tables."""
        name = self.algorithm.type
        return (name if name in SHORT_NAMES["algorithm"] else name.rpartition(":")[2]).lower()


def job_spec(config: RunConfig, name: str) -> JobSpec:
    """The job of a stage, with what the stage leaves open taken from its source or the run."""
    stage = config.stages[name]
    source = getattr(stage, "init_from", None)
    trains = isinstance(stage, (Pretrain, Finetune))
    algorithm: Component | None = getattr(stage, "algorithm", None)
    network: Component | None = getattr(stage, "network", None)
    rollout = config.rollout
    if isinstance(stage, Pretrain):
        rollout = stage.rollout or rollout
    else:
        own = getattr(stage, "rollout", None) or rollout
        rollout = rollout.model_copy(update={"num_envs": own.num_envs, "device": None})
    if source is not None and not source.startswith(RLLIB):
        parent = job_spec(config, source)
        network = network or parent.network
        algorithm = algorithm or (None if trains else parent.algorithm)
    return JobSpec(
        stage=name,
        name=name,
        seed=config.seed,
        evaluation_seed=config.evaluation_seed,
        tasks=config.tasks,
        network=network or config.network,
        algorithm=algorithm or config.algorithm,
        rollout=rollout,
        environments=config.environments,
        env_steps=getattr(stage, "env_steps", 0),
        updates=getattr(stage, "updates", 0),
        trainable=getattr(stage, "trainable", ("",)),
        learner_threads=resolve_auto(config.learners.threads),
        precision=config.learners.precision,
        compile=config.learners.compile,
        device=config.learners.device,
        record=getattr(stage, "record", False),
    )


@dataclass(frozen=True)
class Weights:
    """A policy's weights and their version."""

    version: int
    arrays: Arrays


@dataclass
class Program:
    """The family, policy and algorithm of a job."""

    distribution: TaskDistribution
    policy: ActorCritic
    algorithm: Algorithm
    device: str | None = None  # where it rolls out; None is in NumPy

    def adaptation(self, by: By) -> Adaptation:
        """The adaptation within a trial; None is the algorithm's as it evaluates.

        Raises:
            ValueError: it cannot adapt so.
        """
        if by is None:
            return self.algorithm
        if by == "own":
            return self.algorithm.own_adaptation()
        gamma = float(getattr(self.algorithm.config, "gamma", 0.99))
        return continued(self.algorithm, gamma, by)

    def weights(self) -> Arrays:
        """The policy's parameters and normalisation statistics by name, copied."""
        return get_weights(self.policy)

    def load(self, weights: Arrays) -> None:
        """Give the policy these weights.

        Raises:
            ValueError: they do not fit.
        """
        set_weights(self.policy, weights)

    def sampler(self, num_envs: int) -> Sampler:
        """Environments of the family, with memory as the algorithm has it."""
        spans = self.algorithm.memory_spans_trial
        if self.device is None:
            return Sampler(self.distribution, num_envs, memory_spans_trial=spans)
        device = torch.device(self.device)
        return DeviceSampler(self.distribution, num_envs, memory_spans_trial=spans, device=device)


def build(spec: JobSpec, device: str | None = None) -> Program:
    """Make a job's program; the policy's first weights depend on the seed and the job alone.

    Args:
        spec: of the job.
        device: rolls out there, and not in NumPy.

    Raises:
        ValueError: the parts do not fit together; the message names the setting.
    """
    program = _assemble(spec, load_family(spec.tasks))
    program.device = device
    if device is not None:
        program.policy.to(device)
    return program


def outline(spec: JobSpec) -> Program:
    """Build a job's program on the meta device, to estimate its size.

    A network that cannot be built there is built with real tensors.

    Raises:
        ValueError: as `build`.
    """
    family = load_family(spec.tasks)
    try:
        with torch.device("meta"):
            return _assemble(spec, family)
    except (RuntimeError, TypeError):  # It reads numbers that are not there.
        return _assemble(spec, family)


def _assemble(spec: JobSpec, distribution: TaskDistribution) -> Program:
    kind = _load("algorithm", spec.algorithm, Algorithm)
    # Orthogonal weights differ in their last bits by the number of threads that made them.
    with torch.random.fork_rng(devices=[]), one_thread():
        torch.manual_seed(int(random_stream(spec.seed, *spec.key, "init").integers(2**63)))
        policy = _load("network", spec.network, ActorCritic)(
            spec.network.settings,
            distribution.observation_space,
            distribution.action_space,
            **kind.policy_options(spec.algorithm.settings),
        )
        algorithm = kind(spec.algorithm.settings, distribution, policy)
    algorithm.run_folder = spec.run_folder
    policy.eval()
    per_task = algorithm.envs_per_task
    if spec.rollout.num_envs % per_task:
        raise ValueError(
            f"rollout.num_envs: {spec.rollout.num_envs} environments cannot be divided into tasks "
            f"of {per_task} environments each; use a multiple of {per_task}"
        )
    _check_device(spec, distribution, kind)
    distribution.on_fault = spec.environments.on_error
    if distribution.on_fault != "stop" and not distribution.restarts_episodes:
        raise ValueError(
            f"environments.on_error: {name_of(distribution)} steps its environments together, so "
            "that one of them cannot be replaced; use stop"
        )
    return Program(distribution, policy, algorithm)


def _check_device(spec: JobSpec, family: TaskDistribution, algorithm: type[Algorithm]) -> None:
    """See that the job can roll out where it is to."""
    if spec.rollout.device is None:
        return
    if not family.on_device:
        names = SHORT_NAMES["tasks"]
        others = ", ".join(n for n in names if import_class(n, "tasks").on_device)
        raise ValueError(
            f"rollout.device: {name_of(family)} steps in NumPy alone; use null, or one of {others}"
        )
    if not algorithm.on_device:
        raise ValueError(
            f"rollout.device: {spec.algorithm_name} rolls out in NumPy alone; use null"
        )
    if spec.rollout.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("rollout.device: PyTorch finds no GPU here; use null, or cpu to try it")


def load_family(component: Component) -> TaskDistribution:
    """Make a task family.

    Raises:
        ConfigError: it refuses its settings, or is not one that policies can be built for.
        EnvironmentFault: it raised something else.
    """
    kind, settings = _load("tasks", component, TaskDistribution), component.settings
    contain_exit()
    try:
        with during(CODES["__init__"]):
            family: TaskDistribution = kind(settings)
    except EnvironmentFault:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error
    except MemoryError as error:
        raise ConfigError(
            f"tasks: {name_of(kind)} cannot be made in the memory of this machine; lower its "
            f"settings: {error}"
        ) from error
    except RAISED as error:
        raise fault(kind, "__init__", error) from error
    check_spaces(family)
    return family


def _load(setting: str, component: Component, base: type) -> Any:
    kind = component.load()
    if not issubclass(kind, base):
        raise ValueError(
            f"{setting}.type: {component.type} is no {base.__module__}.{base.__name__}; extend it"
        )
    return kind


def smoke_test(program: Program, spec: JobSpec, asked: str | None = None) -> None:
    """Make two steps in one environment: most broken families show it, before anything starts.

    Args:
        program: of the job.
        spec: of the job.
        asked: a method of its environments that the algorithm learns from.

    Raises:
        EnvironmentFault: the family broke its contract.
        ValueError: it leaves out what is asked.
    """
    family, policy = program.distribution, program.policy
    stream = random_stream(spec.seed, *spec.key, "smoke_test")
    tasks = [task for split in SPLITS for task in sample(family, stream, 1, split)]
    sampler = program.sampler(len(tasks))
    sampler.start(stream, 0)
    sampler.env.tracks_belief = asked is not None
    sampler.begin_trial(tasks, policy)
    if asked is not None:
        _ask(program, spec, sampler.env, asked)
    sampler.rollout(policy, 2, with_value=False)
    if program.algorithm.continues_episodes:
        storable(sampler.get_state())  # for a commit
    sampler.env.close()


def _ask(program: Program, spec: JobSpec, env: TaskVectorEnv, method: str) -> None:
    """See that a method which families may leave out is there."""
    family = program.distribution
    try:
        answer_of(family, getattr(env, method))
    except EnvironmentFault as error:
        if not isinstance(error.__cause__, NotImplementedError):
            raise
        why = f" ({error.__cause__})" if str(error.__cause__) else ""
        raise ValueError(
            f"algorithm.type: {spec.algorithm_name} learns from what environments answer to "
            f"{method}, which {name_of(family)} leaves out{why}; use another algorithm, or a "
            "family that has it"
        ) from error


@contextmanager
def one_thread() -> Iterator[None]:
    """Operations take one thread within."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def get_weights(policy: ActorCritic) -> Arrays:
    """Parameters and normalisation statistics by name, copied."""
    return {name: t.detach().cpu().numpy().copy() for name, t in policy.state_dict().items()}


def optional(name: str) -> bool:
    """Whether a policy can do without the weight of this name: `auxiliary` ones and adapters."""
    return name.startswith("auxiliary.") or "adapter" in name


def set_weights(policy: ActorCritic, weights: Arrays) -> None:
    """Inverse of `get_weights`.

    What is `optional` may be unknown, and is dropped, or missing, and is left as it is: another
    algorithm can start from a policy without the networks that only its first one needed.

    Raises:
        ValueError: a name is missing, unknown or of another shape.
    """
    own = policy.state_dict()
    weights = {k: v for k, v in weights.items() if k in own or not optional(k)}
    own = {k: v for k, v in own.items() if k in weights or not optional(k)}
    problems = [f"{k} is missing" for k in own.keys() - weights.keys()]
    problems += [f"{k} is unknown" for k in weights.keys() - own.keys()]
    problems += [
        f"{k} has shape {weights[k].shape} instead of {tuple(own[k].shape)}"
        for k in own.keys() & weights.keys()
        if tuple(own[k].shape) != weights[k].shape
    ]
    if problems:
        raise ValueError(f"weights do not fit this policy: {'; '.join(sorted(problems))}")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(torch.tensor(weights[name]))
