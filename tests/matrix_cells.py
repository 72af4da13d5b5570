"""The cells of the matrix: which there are, the config of each, and what a run of it leaves."""

from __future__ import annotations

import itertools
import json
import shutil
import zlib
from collections.abc import Callable
from dataclasses import astuple, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dmrl_ray.config.loading import parse_config
from dmrl_ray.control import controller
from dmrl_ray.results.display import Display
from dmrl_ray.results.reading import load
from dmrl_ray.store.commit_records import newest_commit
from dmrl_ray.store.files import LocalFiles, load_arrays
from dmrl_ray.types import Arrays
from tests.matrix_family import EPISODES

COPIES = 2
"""Parallel episodes of one task, where an algorithm or a stage has such."""

REPLAY = {"gradient_steps": 2, "batch_trials": 4, "batch_steps": 4, "critic_hidden_sizes": [8]}
CLIPPED = {"epochs": 1, "minibatches": 2}
GRADIENT = {"episodes_per_task": COPIES, "evaluation_steps": 1}
OUTER = GRADIENT | {"epochs": 1}
READING = {"minibatches": 2, "data": {"stage": "source"}}
ALGORITHMS: dict[str, dict[str, Any]] = {
    "ppo": CLIPPED | {"num_steps": 12},
    "appo": CLIPPED | {"num_steps": 12},
    "impala": {"minibatches": 2, "num_steps": 12},
    "sac": REPLAY | {"num_steps": 12, "replay_trials": 16},
    "pearl": REPLAY | {"latent": 2, "context_hidden_sizes": [8], "replay_trials": 16},
    "stepwise_pearl": REPLAY
    | {
        "belief_steps": 5,
        "latent": 2,
        "context_hidden_sizes": [8],
        "replay_trials": 16,
    },
    "rl2": CLIPPED,
    "varibad": CLIPPED
    | {
        "belief_updates": 1,
        "belief_trials": 2,
        "replay_trials": 16,
        "decoder": {"hidden_sizes": [8]},
    },
    "dagger": {"minibatches": 2},
    "dpt": {"minibatches": 2},
    "maml": OUTER,
    "maml_within": {
        "type": "maml",
        "steps_per_adaptation": 5,
        "episodes_per_task": COPIES,
        "epochs": 1,
    },
    "anil": OUTER | {"type": "maml", "trainable": ["policy_head"]},
    "promp": OUTER,
    "cavia": OUTER,
    "meta_sgd": OUTER,
    "reptile": GRADIENT | {"inner_steps": 2},
    "behavior_cloning": READING,
    "trial_cloning": READING,
    "algorithm_distillation": READING,
    "autoencoder": READING | {"decoder_hidden_sizes": [8]},
    "vae": READING | {"decoder_hidden_sizes": [8], "latent": 2},
    "gail": CLIPPED
    | {"num_steps": 6, "discriminator_hidden_sizes": [8], "data": {"stage": "source"}},
}

GRADIENTS = {"maml", "maml_within", "anil", "promp", "cavia", "meta_sgd", "reptile"}
BELIEFS = {"pearl", "stepwise_pearl"}
VARIANTS = {"stepwise_pearl", "maml_within", "anil"}
MEMORIES = {"rl2", "varibad", "dagger", "dpt", "trial_cloning", "algorithm_distillation"}
"""Whose memory is what adapts to a task."""

READERS = {name for name, settings in ALGORITHMS.items() if "data" in settings}
"""Who learn from what an earlier stage recorded."""

SILENT = READERS - {"gail"}
"""Whose training plays nothing."""

PLAYERS_OF_TRIALS = GRADIENTS | (MEMORIES - READERS) | BELIEFS
"""Whose collections are whole trials."""

UNRECORDED = READERS | {"dpt"}
"""Whose training is not what one could record: it reads, or has other rewards or actions."""


@dataclass(frozen=True)
class Cell:
    """One choice of each of the contract's options."""

    algorithm: str
    lengths: str
    acts: str
    seen: str
    memory: str
    stage: str
    family: str = "walk"

    def __str__(self) -> str:
        return "-".join(astuple(self)[: None if self.family == "gym" else -1])


AXES: dict[str, tuple[str, ...]] = {
    "algorithm": tuple(name for name in ALGORITHMS if name not in VARIANTS),
    "stage": ("pretrain", "finetune", "adapt", "continue", "evaluate", "record"),
    "seen": ("vector", "picture", "dict"),
    "lengths": ("fixed", "varying"),
    "acts": ("discrete", "continuous"),
    "memory": ("no_memory", "memory"),
}
"""``adapt`` is online, by the algorithm's own adaptation; ``continue`` online, by more training;
``record`` keeps the steps of training and evaluation."""


def product(*algorithms: str) -> list[Cell]:
    """Every cell of these algorithms; of all but the variants, if none is named."""
    axes = AXES | {"algorithm": algorithms or AXES["algorithm"]}
    return [
        Cell(**dict(zip(axes, values, strict=True))) for values in itertools.product(*axes.values())
    ]


def more_cells() -> list[Cell]:
    """A few of variants of algorithms, and of an environment of others."""
    return [
        Cell("stepwise_pearl", "varying", "continuous", "vector", "no_memory", "record"),
        Cell("stepwise_pearl", "fixed", "discrete", "dict", "no_memory", "adapt"),
        Cell("maml_within", "varying", "discrete", "vector", "memory", "finetune"),
        Cell("maml_within", "varying", "continuous", "dict", "no_memory", "record"),
        Cell("maml_within", "fixed", "continuous", "vector", "no_memory", "evaluate"),
        Cell("maml_within", "fixed", "discrete", "vector", "no_memory", "adapt"),
        Cell("anil", "varying", "continuous", "vector", "no_memory", "record"),
        Cell("anil", "fixed", "discrete", "vector", "no_memory", "adapt"),
        Cell("ppo", "varying", "continuous", "dict", "memory", "record", "gym"),
        Cell("rl2", "fixed", "discrete", "vector", "memory", "evaluate", "gym"),
        Cell("rl2", "varying", "discrete", "vector", "memory", "record", "gym"),
        Cell("maml", "varying", "discrete", "picture", "no_memory", "record", "gym"),
        Cell("pearl", "varying", "continuous", "vector", "no_memory", "evaluate", "gym"),
    ]


def pairwise(cells: list[Cell], refused: Callable[[Cell], bool]) -> list[Cell]:
    """Few cells in which every two values of two axes meet; the same each time.

    Those that are refused come last, for what no other cell can cover.
    """
    left = set().union(*map(_pairs, cells))
    by_head: dict[tuple[bool, str, str], list[tuple[Cell, set[Any]]]] = {}
    for cell in sorted(cells, key=refused):
        head = (refused(cell), cell.algorithm, cell.stage)
        by_head.setdefault(head, []).append((cell, _pairs(cell)))
    chosen: list[Cell] = []
    while left:
        for head in sorted(by_head, key=lambda head: (head[0], _lot(head))):
            cell, pairs = max(by_head[head], key=lambda pair: (len(pair[1] & left), _lot(pair[0])))
            if pairs & left:
                chosen.append(cell)
                left -= pairs
    return chosen


def _lot(choice: object) -> int:
    return zlib.crc32(str(choice).encode())


def _pairs(cell: Cell) -> set[tuple[tuple[str, str], ...]]:
    values = [(axis, getattr(cell, axis)) for axis in AXES]
    return set(itertools.combinations(values, 2))


def config_of(cell: Cell) -> str:
    """The YAML of a run whose last stage is the cell's."""
    algorithm = {"type": cell.algorithm} | ALGORITHMS[cell.algorithm]
    network: dict[str, Any] = {"type": "actor_critic", "encoder": encoder(cell)}
    if cell.algorithm == "cavia":
        network["context"] = 2
    stages = {"meta": {"type": "pretrain", "env_steps": 161, **VALIDATED}, **_stages(cell)}
    if cell.stage == "record" and cell.algorithm not in UNRECORDED:
        stages["meta"]["record"] = True
    if cell.algorithm in READERS:
        stages = _source(cell) | stages
    config = {
        "name": "cell",
        "tasks": _tasks(cell),
        "network": network,
        "algorithm": algorithm,
        "rollout": {"shards": 2, "num_envs": 4},
        "workers": {"num": 0},
        "learners": {"threads": 1},
        "commit": {"every_updates": 1},
        "stages": stages,
    }
    return json.dumps(config)  # which is YAML, too


VALIDATED = {"validate_every": 1, "validation_tasks": 2}


def _stages(cell: Cell) -> dict[str, dict[str, Any]]:
    start = {"init_from": "meta", "checkpoint": "last"}
    if cell.stage == "finetune":
        columns = COPIES if cell.algorithm not in MEMORIES | BELIEFS else 1
        rollout = {"num_envs": columns}
        return {
            "special": {"type": "finetune", **start, "tasks": 2, "updates": 2, "rollout": rollout}
        }
    if cell.stage in ("adapt", "continue"):
        sizes = {"streams": 2, "tasks_per_stream": 2, "episodes_per_task": 2}
        return {"stream": {"type": "adapt", **start, **sizes, **adaptation(cell.stage)}}
    if cell.stage in ("evaluate", "record"):
        played = {"tasks": 3, "trials": 2, "record": cell.stage == "record"}
        return {"held_out": {"type": "evaluate", **start, **played}}
    return {}


def adaptation(stage: str) -> dict[str, Any]:
    """Whose adaptation the online stage takes."""
    if stage == "adapt":
        return {"by": "own"}
    return {"by": {"type": "continued", "lr": 0.1, "episodes": COPIES}}


def _source(cell: Cell) -> dict[str, dict[str, Any]]:
    """Stages that record what readers read."""
    plain = {
        "network": {
            "type": "actor_critic",
            "encoder": encoder(Cell("ppo", *astuple(cell)[1:4], "no_memory", "")),
        },
        "algorithm": {"type": "ppo"} | ALGORITHMS["ppo"],
    }
    start = {"type": "pretrain", "env_steps": 1, **VALIDATED, **plain}
    source = {"init_from": "start", "record": True}
    if cell.algorithm == "algorithm_distillation":
        small = {"rollout": {"num_envs": 2}, "algorithm": plain["algorithm"]}
        kind = {"type": "finetune", "split": "train", "tasks": 2, "updates": 2, **small}
    else:
        kind = {"type": "evaluate", "split": "train", "tasks": 4, "trials": 2}
    return {"start": start, "source": kind | source}


def _tasks(cell: Cell) -> dict[str, Any]:
    settings = {"seen": cell.seen, "acts": cell.acts, "varying": cell.lengths == "varying"}
    if cell.family == "walk":
        return {"type": "tests.matrix_family:Walk"} | settings
    return {
        "type": "gym",
        "id": "tests.matrix_family:Walk-v0",
        "kwargs": settings,
        "vary": {"goal": [-1, 1], "short": [0.2, 0.8]},
        "episodes": EPISODES,
    }


def encoder(cell: Cell) -> dict[str, Any]:
    """A network of eight units that fits what a cell sees and remembers."""
    mlp: dict[str, Any] = {"type": "mlp", "hidden_sizes": [8]}
    cnn = {"type": "cnn", "channels": [2], "stride": 2, "hidden_sizes": [8]}
    gru = {"type": "gru", "hidden_size": 8}
    remembers = cell.memory == "memory"
    if cell.seen == "dict":
        parts = {"place": mlp, "picture": cnn, "third": mlp}
        network = {"type": "combined", "parts": parts, "trunk": gru if remembers else mlp}
    elif cell.seen == "picture":
        network = gru | {"torso": cnn} if remembers else cnn
    else:
        network = gru if remembers else mlp
    if cell.algorithm == "varibad" and remembers:
        return {"type": "belief", "latent": 2, "history": network, "hidden_sizes": [8]}
    return network


class CopyingDisplay(Display):
    """Copies a run folder once, as a kill would leave it: in a stage, or within its first job."""

    def __init__(self, stage: str, folder: Path, copy: Path, *, within_job: bool) -> None:
        super().__init__(quiet=True)
        self._watched, self._folder, self._copy = stage, folder, copy
        self._within_job = within_job

    def stage(self, name: str, total_steps: int | None = None) -> None:
        super().stage(name, total_steps)
        self._look(name)

    def update(self, stage: str, *arguments: Any, **figures: Any) -> None:
        super().update(stage, *arguments, **figures)
        self._look(stage)

    def _look(self, stage: str) -> None:
        if stage != self._watched or self._copy.exists():
            return
        commit = newest_commit(self._folder)
        if not self._within_job or (commit is not None and stage in commit.state["jobs"]):
            shutil.copytree(self._folder, self._copy)


class Played:
    """What a run of a cell left in its folder, and in a copy of it taken before the run's end."""

    def __init__(self, cell: Cell, root: Path) -> None:
        self.cell = cell
        self.folder, self.copy = root / "cell", root / "copy" / "cell"
        config = parse_config(config_of(cell), "cell.yaml")
        trains = cell.stage in ("pretrain", "finetune", "record")
        stage = "meta" if cell.stage == "record" else list(config.stages)[-1]
        display = CopyingDisplay(stage, self.folder, self.copy, within_job=trains)
        controller.run(config, self.folder, display=display)

    @cached_property
    def episodes(self) -> pd.DataFrame:
        """Of the stages that the cell is about."""
        return self._rows("episodes")

    @cached_property
    def steps(self) -> pd.DataFrame:
        """Recorded transitions of those stages."""
        return self._rows("transitions")

    @cached_property
    def metrics(self) -> pd.DataFrame:
        return self._rows("metrics")

    def _rows(self, table: str) -> pd.DataFrame:
        rows = load(self.folder, table=table)
        return rows[~rows["stage"].isin(["start", "source"])]

    @property
    def training(self) -> pd.DataFrame:
        """Episodes that were learned from."""
        return self.episodes[
            (self.episodes["split"] == "train") | (self.episodes["stage"] == "special")
        ]

    @property
    def playing(self) -> pd.DataFrame:
        """Episodes of held-out tasks that were not learned from, online ones excepted."""
        held_out = self.episodes[self.episodes["split"] != "train"]
        return held_out[held_out["stage"].isin(["meta", "held_out"])]

    @property
    def online(self) -> pd.DataFrame:
        return self.episodes[self.episodes["job"] == "stream"]


def weights_of(folder: Path) -> dict[str, Arrays]:
    """Everything that the newest commit keeps, policies and the state of learners."""
    commit = newest_commit(folder)
    assert commit is not None
    return {name: load_arrays(LocalFiles(folder), record) for name, record in commit.files.items()}


NULLABLE = ("score", "change", "next_obs")


def numbers(frame: pd.DataFrame) -> np.ndarray:
    """All floating-point numbers of a table, those in lists included, without nulls that may be."""
    parts = [np.empty(0)]
    for name in frame:
        cells = frame[name].dropna() if name in NULLABLE else frame[name]
        if len(cells) and isinstance(cells.iloc[0], np.ndarray):
            parts.append(np.concatenate(list(cells)))
        elif cells.dtype.kind == "f":
            parts.append(cells.to_numpy())
    return np.concatenate(parts).astype(np.float64)
