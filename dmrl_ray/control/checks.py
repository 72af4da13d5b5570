"""Checks of a config before anything starts: its parts fit together and into memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
from torch import nn

from dmrl_ray.algorithms.offline import open_dataset
from dmrl_ray.cluster.placement import check_gpu
from dmrl_ray.config.components import at_default, did_you_mean
from dmrl_ray.config.schema import (
    RLLIB,
    Adapt,
    Finetune,
    Pretrain,
    RolloutSettings,
    RunConfig,
    Stage,
)
from dmrl_ray.control.held_out import check_seen
from dmrl_ray.data.sources import recordings_of
from dmrl_ray.errors import IncompatibleSettings
from dmrl_ray.jobs.external import check_external, external_of
from dmrl_ray.jobs.learner import compiled
from dmrl_ray.jobs.memory import Part, estimate, machine_bytes, refusal
from dmrl_ray.jobs.spec import (
    JobSpec,
    Program,
    build,
    job_spec,
    load_family,
    outline,
    smoke_test,
)
from dmrl_ray.jobs.transfer import rllib_start
from dmrl_ray.tasks.faults import answer_of, first_obs, name_of, sample
from dmrl_ray.types import SPLITS

PLAYED_STEPS = 10
"""Steps of each of the two plays by which `unrepeatable` compares."""


def check(config: RunConfig) -> list[Part]:
    """Find what does not fit together before anything starts.

    Returns:
        The memory of the stage that needs most.

    Raises:
        IncompatibleSettings: all that was found, each with its stage and setting.
        EnvironmentFault: the task family breaks its contract within the first steps.
    """
    problems: dict[str, str] = {}  # sentence, and the first stage that it is of

    def attempt(stage: str, step: Callable[[], object]) -> bool:
        try:
            step()
        except ValueError as error:
            problems.setdefault(str(error), stage)
            return False
        return True

    attempt("", lambda: load_family(config.tasks))
    held: dict[str, list[Part]] = {}
    # What cannot be made, or would not fit into memory, is not made.
    stages = () if problems else config.stages
    names = [name for name in stages if attempt(name, partial(_measure, config, name, held))]
    too_large = _too_large(held)
    for setting, (name, text) in too_large.items():
        problems.setdefault(text, "" if setting.startswith("tasks.") else name)
    for name in names if not too_large else ():
        attempt(name, partial(_check_stage, config, name))
    own: dict[str, Stage] = {}  # whose algorithm is no other library's
    if attempt("", lambda: own.update(_own(config))):
        attempt("", partial(_check_learners, config, own))
        attempt("", partial(_check_shared, config, own))
    attempt("", partial(check_gpu, config))
    if problems:
        raise IncompatibleSettings([(stage, text) for text, stage in problems.items()])
    return max(held.values(), key=lambda parts: sum(p.about_bytes for p in parts), default=[])


def unrepeatable(config: RunConfig) -> str | None:
    """A sentence on what it means that two plays of one seed differ, if they do.

    Raises:
        EnvironmentFault: the family breaks its contract within the first steps.
    """
    family, stream = load_family(config.tasks), np.random.default_rng(0)
    family.on_fault = config.environments.on_error
    tasks = [task for split in SPLITS for task in sample(family, stream, 1, split)]
    env = answer_of(family, family.make_vec, len(tasks))
    family.action_space.seed(0)
    actions = [[family.action_space.sample() for _ in tasks] for _ in range(PLAYED_STEPS)]

    def play() -> list[bytes]:
        env.np_random = np.random.default_rng(0)
        answer_of(family, env.set_tasks, tasks)
        seen = [np.asarray(first_obs(family, env)).tobytes()]
        for action in actions:
            answer = answer_of(family, env.step, np.array(action))
            seen += [np.asarray(x).tobytes() for x in answer[:4]]
        return seen

    repeated = play() == play()
    answer_of(family, env.close)
    if repeated:
        return None
    return (
        f"{name_of(family)}: two plays of one seed and the same actions differ, as where random "
        "numbers are global ones, a clock is read, or state is kept over episodes: runs of one "
        "seed will differ, and a resumed run begins its open episodes again"
    )


def _measure(config: RunConfig, name: str, held: dict[str, list[Part]]) -> None:
    """Note the memory of a stage; that of other libraries' algorithms is not known."""
    spec = job_spec(config, name)
    if external_of(spec) is None:
        held[name] = estimate(outline(spec), spec, config.stages[name], config.learners.num)


def _too_large(held: dict[str, list[Part]]) -> dict[str, tuple[str, str]]:
    """By setting to lower: the first stage that does not fit into this machine, and why."""
    limit, found = machine_bytes(), dict[str, tuple[str, str]]()
    for name, parts in held.items():
        text = refusal(parts, limit)
        if text is not None:
            found.setdefault(text.partition(": ")[0], (name, text))
    return found


def _check_stage(config: RunConfig, name: str) -> None:
    stage, spec = config.stages[name], job_spec(config, name)
    source = stage.init_from
    start = job_spec(config, source) if source in config.stages else None
    if check_external(spec, stage, start):
        if config.environments.on_error != "stop":
            raise ValueError(
                f"environments.on_error: {spec.algorithm_name} steps environments by itself; use "
                "stop"
            )
        return
    program = build(spec)
    asked = None
    if isinstance(stage, (Pretrain, Finetune)):
        asked = program.algorithm.label_method
        program.algorithm.prepare_training(spec.trainable)
        _check_learning(program, spec, stage)
    _check_acting(program, spec, stage)
    _check_data(config, name, program)
    if start is not None:
        _check_start(program, spec, start)
    elif source is not None and source.startswith(RLLIB):
        rllib_start(source, program.policy)
    smoke_test(program, spec, asked)


def _check_learners(config: RunConfig, own: Mapping[str, Stage]) -> None:
    """See that settings of learners are read by one."""
    learners = config.learners
    stages = [stage for stage in config.stages.values() if isinstance(stage, Pretrain)]
    on_device = any((stage.rollout or config.rollout).device for stage in stages)
    if learners.num > 1 and (config.workers.num == 0 or on_device):
        alone = "rollout.device" if on_device else "workers.num: 0"
        raise ValueError(
            f"learners.num: {learners.num} learners are processes beside workers, and {alone} "
            "keeps everything in this one; use 1"
        )
    trains = any(isinstance(stage, Pretrain) for stage in own.values())
    for name in () if trains else ("num", "device", "compile"):
        if not at_default(learners, name):
            raise ValueError(f"learners.{name}: no stage pretrains with it; leave it out")


def _check_shared(config: RunConfig, own: Mapping[str, Stage]) -> None:
    """See that every setting that the run has for its stages is read by one of them."""
    for setting in ("network", "algorithm"):
        taken = any(
            getattr(job_spec(config, name), setting) is getattr(config, setting)
            for name in config.stages
        )
        if not taken and not at_default(config, setting):
            raise ValueError(f"{setting}: every stage has one of its own; leave it out")
    training = [stage for stage in own.values() if isinstance(stage, (Pretrain, Finetune))]
    readers = [stage for stage in training if stage.rollout is None]
    for field in RolloutSettings.model_fields:
        reads = any(field == "num_envs" or isinstance(stage, Pretrain) for stage in readers)
        if not reads and not at_default(config.rollout, field):
            raise ValueError(f"rollout.{field}: no stage takes it from here; leave it out")


def _own(config: RunConfig) -> dict[str, Stage]:
    stages = config.stages.items()
    return {name: stage for name, stage in stages if external_of(job_spec(config, name)) is None}


def _check_learning(program: Program, spec: JobSpec, stage: Pretrain | Finetune) -> None:
    """See that an algorithm learns as the learner and the network are set."""
    algorithm, name = program.algorithm, spec.algorithm_name
    if spec.precision != "float32" and not algorithm.takes_minibatches:
        raise ValueError(
            f"learners.precision: {name} takes no gradient steps on minibatches, so that all of it "
            "is in float32; leave it out"
        )
    if algorithm.frozen_statistics and any(
        isinstance(module, nn.Dropout) and module.p for module in program.policy.modules()
    ):
        raise ValueError(
            f"network.encoder: gradient steps of {name} see the network as it acts, without "
            "dropout; leave it out"
        )
    if isinstance(stage, Finetune):
        return
    if spec.compile:
        compiled(algorithm, spec)
    _check_lag(program, spec, stage.max_policy_lag)


def _check_acting(program: Program, spec: JobSpec, stage: Stage) -> None:
    """See that a policy is built and acts as the network and the stage are set."""
    algorithm, network = program.algorithm, spec.network.settings
    for setting in algorithm.network_unread:
        if setting in type(network).model_fields and not at_default(network, setting):
            raise ValueError(
                f"network.{setting}: {spec.algorithm_name} leaves no choice in it; leave it out"
            )
    acts = program.adaptation(stage.by) if isinstance(stage, Adapt) else algorithm
    greedy = "greedy" in type(stage).model_fields and not at_default(stage, "greedy")
    if greedy and not acts.acts_greedily:
        raise ValueError("greedy: adaptation by gradients of returns always samples; leave it out")


def _check_lag(program: Program, spec: JobSpec, lag: int) -> None:
    if lag and not program.algorithm.corrects_for_lag:
        raise ValueError(
            f"max_policy_lag: {spec.algorithm_name} updates as if its newest policy had acted; use "
            "0, or an algorithm that corrects for older ones, such as impala"
        )


def _check_data(config: RunConfig, name: str, program: Program) -> None:
    """See that a stage that learns from data will find them, and that it records what it plays."""
    algorithm = program.algorithm
    stages, stage = list(config.stages), config.stages[name]
    recorded = isinstance(stage, (Pretrain, Finetune)) and stage.record
    if recorded and not algorithm.recordable:
        raise ValueError("record: this algorithm does not play by the environment's rewards alone")
    learns_from = recordings_of(algorithm.config)
    for field, data in learns_from.items():
        if data.stage is None or data.runs:
            open_dataset(algorithm, data)
        elif data.stage not in stages[: stages.index(name)]:
            raise ValueError(
                f"algorithm.{field}.stage: there is no earlier stage {data.stage!r}"
                + did_you_mean(data.stage, stages[: stages.index(name)])
            )
        elif not getattr(config.stages[data.stage], "record", False):
            raise ValueError(
                f"algorithm.{field}.stage: stage {data.stage!r} is not recorded; give it "
                "record: true"
            )
    check_seen(config, name, learns_from, algorithm.distribution)


def _check_start(program: Program, spec: JobSpec, source: JobSpec) -> None:
    """See that a stage can begin with the policy that another stage leaves."""
    start = build(source)
    here, there = spec.algorithm_name, source.algorithm_name
    if start.policy.sees_previous != program.policy.sees_previous:
        seeing, blind = (there, here) if start.policy.sees_previous else (here, there)
        raise ValueError(
            f"init_from: a policy of {seeing} observes its last action and reward, one of {blind} "
            f"does not, so {here} cannot continue with the policy of stage {source.stage!r}, which "
            f"is {there}'s; use algorithm: {there} here, or start from another stage"
        )
    try:
        program.load(start.weights())
    except ValueError as error:
        raise ValueError(
            f"init_from: the policy of stage {source.stage!r} does not fit; leave network out, or "
            f"make it the same: {error}"
        ) from error
