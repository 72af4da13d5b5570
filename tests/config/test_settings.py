"""A setting is read or refused: every field of every settings class, walked.

Each is changed in a tiny run. That changes what the run writes, or is refused in one sentence, or
the field stands in `UNSEEN` with the reason why neither can be.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dmrl_ray.config.components import (
    LARGEST_COUNT,
    LARGEST_NUMBER,
    LARGEST_SEED,
    LARGEST_SIZE,
    SHORT_NAMES,
    Settings,
    import_class,
)
from dmrl_ray.config.loading import parse_config
from dmrl_ray.config.schema import (
    Adapt,
    CommitSettings,
    ContinuedTraining,
    EnvironmentSettings,
    Evaluate,
    Finetune,
    LearnerSettings,
    Pretrain,
    RolloutSettings,
    RunConfig,
    TaskRollout,
    WorkerSettings,
)
from dmrl_ray.control import controller
from dmrl_ray.control.checks import check
from dmrl_ray.data.sources import RLLIB_COLUMNS, DataSettings
from dmrl_ray.envs.gym_env import Choices, ReferenceReturns
from dmrl_ray.errors import ConfigError
from dmrl_ray.networks.actor_critic import ActorCritic
from dmrl_ray.networks.decoder import TrialDecoder
from dmrl_ray.results.display import Display
from dmrl_ray.results.reading import load
from tests.config.settings_walk import (
    Section,
    base_of,
    counts,
    drop_what_is_unread,
    fate,
    other_values,
    put,
)
from tests.matrix_cells import ALGORITHMS, BELIEFS, MEMORIES, READERS

MLP: dict[str, Any] = {"type": "mlp", "hidden_sizes": [8]}
GRU: dict[str, Any] = {"type": "gru", "hidden_size": 8}
WALK: dict[str, Any] = {"type": "tests.matrix_family:Walk"}
PPO: dict[str, Any] = {"type": "ppo", "num_steps": 10, "epochs": 2, "minibatches": 2}
READS: dict[str, Any] = {"runs": ["DATA/run"], "stage": "source"}


def network(encoder: dict[str, Any], **settings: Any) -> dict[str, Any]:
    return {"type": "actor_critic", "encoder": encoder, **settings}


def tiny(**changes: Any) -> dict[str, Any]:
    """Two updates of a small policy, validated on a task at the end."""
    meta = {"type": "pretrain", "env_steps": 80, "validation_tasks": 1}
    config = {
        "tasks": WALK,
        "network": network(MLP),
        "algorithm": PPO,
        "rollout": {"shards": 1, "num_envs": 4},
        "workers": {"num": 0},
        "learners": {"threads": 1},
        "stages": {"meta": meta},
    }
    for path, value in changes.items():
        put(config, path.replace("__", "."), json.loads(json.dumps(value)))
    return config


# Algorithms: each in the smallest run of it, and the networks that they take.


def algorithm_config(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    kind = settings.get("type", name)
    encoder = GRU if kind in MEMORIES and kind != "varibad" else MLP
    if kind == "varibad":
        encoder = {"type": "belief", "latent": 2, "history": GRU, "hidden_sizes": [8]}
    more = {"context": 2} if kind == "cavia" else {}
    settings = {"type": kind, **settings}
    if "data" in settings:
        settings["data"] = READS
    if "epochs" in settings:
        settings["epochs"] = 2
    continuous = {"type": WALK["type"], "acts": "continuous"}
    tasks = continuous if kind in {"sac", *BELIEFS} else WALK
    steps = 2 * 4 * (20 if kind == "gail" else settings.get("num_steps", 20))
    return tiny(
        tasks=tasks,
        network=network(encoder, **more),
        algorithm=settings,
        stages__meta__env_steps=steps,
    )


RUNS = {
    name: algorithm_config(name, settings)
    for name, settings in ALGORITHMS.items()
    if name not in {"anil", "maml_within"}
}
RUNS["dpt_reading"] = algorithm_config("dpt", {"type": "dpt", "minibatches": 2, "data": READS})

VALUES: dict[str, list[Any]] = {
    "trainable": [["policy_head"]],
    "steps_per_adaptation": [5],
    "replay_trials": [4, 2],
    "belief_steps": [3],
    "experts": [{"runs": ["DATA/run"], "stage": "other"}],
}
"""Of algorithms."""

ONE_OF_DPT = {"newest", "experts"}

ALIKE = {
    "appo": "ppo",
    "promp": "maml",
    "cavia": "maml",
    "stepwise_pearl": "pearl",
    "meta_sgd": "maml",
    "trial_cloning": "behavior_cloning",
    "algorithm_distillation": "behavior_cloning",
    "vae": "autoencoder",
}
"""Whose inherited settings are walked where slow tests are: the other one's always are."""


def is_inherited(section: Section, name: str) -> bool:
    """Whether a field is walked elsewhere, in the algorithm that this section's extends."""
    kind = section.name.split()[-1] if " in" not in section.name else section.name.split()[0]
    if kind not in ALIKE:
        return False
    fields = import_class(ALIKE[kind], "algorithm").Config.model_fields
    return not section.name.startswith("algorithm") or name in fields


def algorithm_sections() -> Iterator[Section]:
    for name, config in RUNS.items():
        kind = config["algorithm"]["type"]
        model = import_class(kind, "algorithm").Config
        reading = name == "dpt_reading"
        only = tuple(n for n in model.model_fields if (n in ONE_OF_DPT) == reading)
        yield Section(f"algorithm {name}", model, "algorithm", config, VALUES, only=only)
        if reading:
            continue
        encoder = (
            {"type": "lstm", "hidden_size": 8}
            if kind in MEMORIES
            else {"type": "mlp", "hidden_sizes": [9]}
        )
        if kind == "varibad":
            encoder = {"type": "belief", "latent": 3}
        values = {"encoder": [encoder], "critic_only": [["task"]]}
        beside = {"critic_only": {"tasks": {"type": "observe", "of": config["tasks"]}}}
        fields = [*ActorCritic.Config.model_fields]
        if kind in READERS:  # Nothing of the kind is recorded.
            fields.remove("critic_only")
        yield Section(
            f"network of {name}", ActorCritic.Config, "network", config, values, beside, (*fields,)
        )
        yield Section(f"{name} in", LearnerSettings, "learners", config, only=("precision",))
    yield Section(
        "decoder of varibad",
        TrialDecoder.Config,
        "algorithm.decoder",
        RUNS["varibad"],
        {"heads": ["action"], "rewards": ["binary"]},
    )


# Networks: each reads the walk as it needs to see it.


def encoder_config(encoder: dict[str, Any]) -> dict[str, Any]:
    kind = encoder["type"]
    seen = {"cnn": "picture", "residual": "picture", "combined": "dict"}.get(kind, "vector")
    algorithm = {"type": "rl2", "epochs": 2, "minibatches": 2}
    if kind == "belief":
        algorithm = RUNS["varibad"]["algorithm"]
    return tiny(
        tasks={**WALK, "seen": seen},
        network=network(encoder),
        algorithm=algorithm if kind in IN_TRIALS else PPO,
        stages__meta__env_steps=160 if kind in IN_TRIALS else 80,
    )


IN_TRIALS = {"belief", "transformer", "symmetric", "tabular"}
CNN = {"type": "cnn", "channels": [2], "stride": 2, "hidden_sizes": [8]}
ENCODERS: list[dict[str, Any]] = [
    MLP,
    CNN,
    {"type": "residual", "channels": [2], "blocks": 1, "hidden_sizes": [8]},
    {"type": "embedding", "size": 8},
    {"type": "combined", "parts": {"place": MLP, "picture": CNN, "third": MLP}},
    {"type": "lstm", "hidden_size": 8},
    GRU,
    {"type": "belief", "latent": 2, "history": GRU, "hidden_sizes": [8]},
    {"type": "rnn", "hidden_size": 8},
    {"type": "transformer", "hidden_size": 8, "layers": 1, "heads": 2, "context": 4},
    {"type": "symmetric", "hidden_size": 8, "width": 4},
    {"type": "tabular", "hidden_size": 8, "width": 4},
]
OTHER_NETWORKS: dict[str, list[Any]] = {
    "torso": [MLP],
    "trunk": [MLP],
    "history": [{"type": "lstm", "hidden_size": 8}],
    "parts": [{"place": {"type": "mlp", "hidden_sizes": [9]}, "picture": CNN, "third": MLP}],
}


def encoder_sections() -> Iterator[Section]:
    for encoder in ENCODERS:
        kind = encoder["type"]
        model = import_class(kind, "encoder").Config
        config = encoder_config(encoder)
        yield Section(f"encoder {kind}", model, "network.encoder", config, OTHER_NETWORKS)


# Task families.

VARIED = {"type": "gym", "id": "tests.matrix_family:Walk-v0", "vary": {"goal": [-1, 1]}}
CHOSEN = {**VARIED, "vary": {"goal": {"choices": [-1, -0.5, 0, 0.5, 1]}}}
FAMILIES: list[dict[str, Any]] = [
    {"type": "bandit", "arms": 2, "pulls": 5},
    {"type": "informative_bandit", "pulls": 3},
    {"type": "restless_bandit", "pulls": 5},
    {"type": "two_step", "rounds": 5, "reversal": 0.3},
    {"type": "tabular_mdp", "episodes": 2},
    {"type": "grid_nav", "episodes": 2},
    {"type": "point_goal", "horizon": 5},
    {"type": "cartpole"},
    VARIED,
    {"type": "observe", "of": WALK},
]
OTHER_TASKS: dict[str, list[Any]] = {
    "id": ["CartPole-v1"],
    "kwargs": [{"acts": "continuous"}],
    "vary": [{"goal": [-0.5, 1]}],
    "reference": [{"random": 0.0, "oracle": 5.0}],
    "max_episode_steps": [5],
    "of": [{"type": "bandit", "pulls": 5}],
    "show": [["task", "belief"]],
}
GYM = {"held_out": {"tasks": CHOSEN}, "id": {"tasks.vary": {}}}


def family_sections() -> Iterator[Section]:
    for family in FAMILIES:
        kind = family["type"]
        model = import_class(kind, "tasks").Config
        config = tiny(tasks=family, stages__meta__validation_tasks=4)
        yield Section(
            f"tasks {kind}", model, "tasks", config, OTHER_TASKS, GYM if kind == "gym" else {}
        )
    config = tiny(tasks=CHOSEN)
    values = {"choices": [[-1, -0.5, 0, 0.25, 1]]}
    yield Section("choices of gym", Choices, "tasks.vary.goal", config, values)
    config = tiny(tasks={**VARIED, "reference": {"random": 0.0, "oracle": 5.0}})
    yield Section("reference of gym", ReferenceReturns, "tasks.reference", config)


# Data.

FILES = {"files": ["DATA/files/a.parquet"]}
DATA_VALUES = {
    "stage": ["other"],
    "runs": [["DATA/again"]],
    "files": [["DATA/files/b.parquet"]],
    "columns": [{"action": "other"}],
    "rllib": [["DATA/rllib/b.parquet"]],
}
DATA_BESIDE = {
    "files": {"algorithm.data": FILES},
    "columns": {"algorithm.data": FILES},
    "rllib": {"algorithm.data": {"rllib": ["DATA/rllib/a.parquet"]}},
}


# Stages, and the run.

START = {"init_from": "meta"}
OTHER_MLP = network({**MLP, "activation": "tanh"})
WIDER = network({**MLP, "adapters": 2})
IMPALA = {"type": "impala", "num_steps": 10}
REPTILE = {"type": "reptile", "episodes_per_task": 2, "evaluation_steps": 1, "inner_steps": 2}
WORSE = {"stages.meta.validate_every": 1, "algorithm.lr": 0.3}
STAGE_VALUES: dict[str, list[Any]] = {
    "algorithm": [IMPALA],
    "network": [OTHER_MLP, WIDER],
    "init_from": ["first"],
    "validate_every": [1],
    "trainable": [["policy_head"], ["encoder"]],
    "by": [{"type": "continued", "episodes": 2}],
}
TRIES = {"algorithm": [REPTILE]}


def stage_sections() -> Iterator[Section]:
    first = {"type": "pretrain", "env_steps": 40, "validation_tasks": 1, "algorithm": IMPALA}
    both = {"first": first, "meta": tiny()["stages"]["meta"]}
    start = tiny(stages=both)
    lag = {"max_policy_lag": {"stages.meta.env_steps": 160}}
    yield Section("pretrain", Pretrain, "stages.meta", start, STAGE_VALUES, lag)
    stages: dict[str, tuple[Any, dict[str, Any]]] = {
        "finetune": (Finetune, {"tasks": 2, "updates": 1}),
        "adapt": (Adapt, {"streams": 2, "tasks_per_stream": 2, "episodes_per_task": 2}),
        "evaluate": (Evaluate, {"tasks": 2}),
    }
    for kind, (model, settings) in stages.items():
        later = {"type": kind, **START, **settings}
        values = STAGE_VALUES if kind == "finetune" else {**STAGE_VALUES, **TRIES}
        yield Section(
            kind,
            model,
            "stages.later",
            tiny(stages={**both, "later": later}),
            values,
            {"checkpoint": WORSE},
        )
    own = {"shards": 1, "num_envs": 4}
    config = tiny(stages__meta__rollout=own, rollout={})
    yield Section("rollout of pretrain", RolloutSettings, "stages.meta.rollout", config)
    tuned = {"type": "finetune", **START, "tasks": 1, "updates": 1, "rollout": {"num_envs": 4}}
    config = tiny(stages__later=tuned)
    yield Section("rollout of finetune", TaskRollout, "stages.later.rollout", config)
    by = {"type": "continued", "episodes": 2}
    far = {"trainable": {"stages.later.by.lr": 100.0}}
    met = {"type": "adapt", **START, "streams": 2, "tasks_per_stream": 2, "by": by}
    config = tiny(stages__later=met)
    yield Section("by of adapt", ContinuedTraining, "stages.later.by", config, STAGE_VALUES, far)
    for name, fields in SCHEDULES.items():
        tuned = {"type": "finetune", **START, "tasks": 1, "updates": 2}
        tuned["algorithm"] = RUNS[name]["algorithm"]
        config = {**RUNS[name], "stages": {**RUNS[name]["stages"], "later": tuned}}
        model = import_class(name, "algorithm").Config
        path = "stages.later.algorithm"
        yield Section(f"{name} of finetune", model, path, config, VALUES, only=fields)


SCHEDULES = {
    "ppo": ("anneal_lr", "anneal_entropy"),
    "maml": ("anneal_lr",),
    "sac": ("anneal_lr",),
    "dagger": ("anneal_lr", "beta", "beta_until"),
}
"""Settings that depend on how much of the budget is spent, which in fine-tuning is in updates."""


def run_sections() -> Iterator[Section]:
    config = tiny()
    values = {"tasks": [{"type": "bandit"}], "network": [OTHER_MLP], "algorithm": [IMPALA]}
    yield Section("run", RunConfig, "", config, values, only=(*NOT_NESTED,))
    yield Section("rollout", RolloutSettings, "rollout", config)
    yield Section("workers", WorkerSettings, "workers", config)
    yield Section("environments", EnvironmentSettings, "environments", config)
    yield Section("learners", LearnerSettings, "learners", config)
    yield Section("commit", CommitSettings, "commit", config)


NOT_NESTED = [name for name in RunConfig.model_fields if name not in {"stages"}]


def data_sections() -> Iterator[Section]:
    config = RUNS["behavior_cloning"]
    yield Section("data", DataSettings, "algorithm.data", config, DATA_VALUES, DATA_BESIDE)


SECTIONS = [
    *run_sections(),
    *stage_sections(),
    *family_sections(),
    *encoder_sections(),
    *algorithm_sections(),
    *data_sections(),
]

UNSEEN = {
    "run.name": "names the folder",
    "workers.num": "spreads the same work over more processes",
    "workers.max_failures": "says when a run that loses workers stops, on Ray",
    "environments.max": "counts faults, of gym alone: tests/control/test_restarted_episodes.py",
    "environments.timeout_s": "says when a long call is an error: tests/jobs/test_liveness.py",
    "learners.threads": "changes the last bits, of large networks",
    "learners.compile": "compiles for seconds: tests/algorithms/test_gradients.py",
    "commit.every_s": "says when a run is durable",
    "commit.every_updates": "says when a run is durable",
    "commit.keep": "says what a damaged run can go back to",
    "data.memory_mb": "changes the speed of reading",
    "data.minari": "needs a package that is no dependency: tests/algorithms/test_offline.py",
}
"""What changes no result, or none that a tiny run could show, and why."""


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Recordings to learn from: a run, and files of others."""
    folder = tmp_path_factory.mktemp("data")
    played = {"type": "finetune", "init_from": "meta", "split": "train", "tasks": 2, "updates": 1}
    config = tiny(stages__source={**played, "record": True})
    config["stages"]["other"] = {**played, "record": True, "updates": 2}
    controller.run(
        parse_config(json.dumps(config), "data.yaml"), folder / "run", display=Display(quiet=True)
    )
    controller.run(
        parse_config(json.dumps({**config, "seed": 1}), "data.yaml"),
        folder / "again",
        display=Display(quiet=True),
    )
    steps = load(folder / "run", table="transitions")
    steps = steps[["obs", "action", "reward", "terminated", "truncated"]].iloc[:400]
    steps["other"] = steps["action"].to_numpy()[::-1]
    for name, rows in {"a": steps.iloc[:200], "b": steps.iloc[200:]}.items():
        (folder / "files").mkdir(exist_ok=True)
        (folder / "rllib").mkdir(exist_ok=True)
        rows.to_parquet(folder / "files" / f"{name}.parquet")
        theirs = rows.assign(eps_id=0, next_obs=rows["obs"], episode=0).rename(
            columns=RLLIB_COLUMNS
        )
        theirs.loc[:, ~theirs.columns.duplicated()].to_parquet(folder / "rllib" / f"{name}.parquet")
    return str(folder)


CASES = [
    (section, name)
    for section in SECTIONS
    for name in section.fields()
    if f"{section.name}.{name}" not in UNSEEN
]


@pytest.mark.parametrize(
    ("section", "name"),
    [
        pytest.param(
            section,
            name,
            id=f"{section.name}.{name}",
            marks=[pytest.mark.slow] if is_inherited(section, name) else [],
        )
        for section, name in CASES
    ],
)
def test_a_setting_is_read_or_refused(section, name, data):
    assert fate(section, name, data) in ("read", "refused")


WALKED = {section.model for section in SECTIONS}


def test_every_settings_class_is_walked():
    for group in SHORT_NAMES:
        for name in SHORT_NAMES[group]:
            if not name.startswith("rllib:"):  # Whose settings RLlib reads: tests/rllib.
                assert import_class(name, group).Config in WALKED, name
    for kind in below(Settings):
        # RLlib's are known where another test has imported them.
        named = re.match(r"dmrl_ray\.(?!rllib\.)", kind.__module__)
        ours = named is not None and kind.model_fields
        assert not ours or WALKED & {kind, *below(kind)}, kind


def below(kind: type) -> list[type]:
    """All that extend a class."""
    return [more for child in kind.__subclasses__() for more in (child, *below(child))]


def test_settings_listed_as_unseen_exist():
    fields = {f"{section.name}.{name}" for section in SECTIONS for name in section.fields()}
    assert set(UNSEEN) <= fields


CONDITIONAL = {
    f"{section.name}.{name}": (section, name)
    for section in SECTIONS
    for name in section.fields()
    if name in section.model.conditions()
}


@pytest.mark.parametrize("case", CONDITIONAL)
def test_settings_without_effect_are_refused(case, data):
    section, name = CONDITIONAL[case]
    other, values = section.model.conditions()[name]
    config = base_of(section, name, data)
    default = section.model.model_fields[name].default
    value = next(v for v in other_values(section, name, config) if v != default)
    off = other_values(section, other, config) if values else [0, None, False, [], {}]
    told = []
    for without in (v for v in off if v not in values):
        put(config, f"{section.path}.{other}", without)
        drop_what_is_unread(section, config)
        put(config, f"{section.path}.{name}", value)
        with pytest.raises(ConfigError) as error:
            parse_config(json.dumps(config).replace("DATA", data), "off.yaml")
        told.append(str(error.value))
    assert any(f".{name}: is read only where {other} is" in text for text in told)


COUNTS = [
    (section, name, counts(section.model, name))
    for section in {section.model: section for section in SECTIONS}.values()
    for name in section.model.model_fields
    if counts(section.model, name)
]


@pytest.mark.parametrize(
    ("section", "name", "schemas"), COUNTS, ids=[f"{s.name}.{name}" for s, name, _ in COUNTS]
)
def test_a_count_has_a_bound_and_one_more_is_refused_in_one_sentence(section, name, schemas):
    for schema in schemas:
        assert "maximum" in schema, schema
        config = json.loads(json.dumps(section.config))
        value = schema["maximum"] + 1
        listed = section.model.model_json_schema()["properties"][name].get("type") == "array"
        put(config, f"{section.path}.{name}".strip("."), [value] if listed else value)
        with pytest.raises(ConfigError, match=f"must be at most {schema['maximum']}") as error:
            parse_config(json.dumps(config), "large.yaml")
        assert str(error.value).count("large.yaml:") == 1


def test_the_largest_seeds_last_to_the_end_of_a_run(tmp_path):
    config = tiny(seed=LARGEST_SEED, evaluation_seed=LARGEST_SEED, stages__meta__record=True)
    config["stages"]["later"] = {"type": "evaluate", **START, "tasks": 1}
    config = parse_config(json.dumps(config), "seeds.yaml")
    controller.run(config, tmp_path / "run", display=Display(quiet=True))
    assert (load(tmp_path / "run")["seed"] == LARGEST_SEED).all()


def test_learners_of_their_own_need_workers():
    config = parse_config(json.dumps(tiny(learners__num=2)), "two.yaml")
    with pytest.raises(ConfigError, match=r"learners\.num: 2 learners are processes .*; use 1"):
        check(config)


def test_the_page_on_settings_lists_settings_without_effect_on_results():
    page = (Path(__file__).parents[2] / "docs" / "settings.md").read_text()
    for name in UNSEEN:
        shown = name.replace("run.", "").replace("data.", "")
        assert f"`{shown}`" in page, name
    for bound in (LARGEST_SIZE, LARGEST_NUMBER, LARGEST_COUNT):
        assert f"{bound:,}" in page
