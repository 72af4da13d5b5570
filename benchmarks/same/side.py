"""Runs the cases of one side; both sides run this file of the newer checkout.

    python side.py PLAN FOLDER          with a checkout as working directory and PYTHONPATH

PLAN is a JSON file ``{case: {config, stops}}``. For each case, FOLDER gets ``CASE.npz``, the arrays
of the run by name, and ``CASE.json``, the refused stages and the error, if any. Names of arrays:

    weights/trained.best/encoder.0.weight      checkpoint file and array; also of learners and
                                               shards: optimisers, replays, random states
    episodes/held_out/return                   table, job and column
    metrics/trained/policy_loss/value          table, job, metric and column

Names are those of the newer checkout; this file maps the older ones.
"""

from __future__ import annotations

import copy
import json
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import safetensors.numpy

import dmrl_ray
from dmrl_ray import load
from dmrl_ray.config import RunConfig
from dmrl_ray.errors import ConfigError, Interrupted

try:
    from dmrl_ray.config.loading import parse_config
    from dmrl_ray.control import controller
    from dmrl_ray.results.display import Display
except ModuleNotFoundError:  # An older checkout without subpackages.
    from dmrl_ray import controller
    from dmrl_ray.display import Display
    from dmrl_ray.yaml_config import parse_config

Settings = dict[str, Any]


def _algorithms(config: Settings) -> Iterator[Settings]:
    for section in (config, *config["stages"].values()):
        if isinstance(section.get("algorithm"), dict):
            yield section["algorithm"]


def _steps_per_shot(config: Settings) -> None:
    for algorithm in _algorithms(config):
        if "steps_per_adaptation" in algorithm:
            algorithm["steps_per_shot"] = algorithm.pop("steps_per_adaptation")


def _by(config: Settings) -> None:
    for stage in config["stages"].values():
        by = stage.pop("by", None)
        if isinstance(by, dict):
            by = {name: value for name, value in by.items() if name not in ("type", "weight_decay")}
            stage["episodes_per_update"] = by.pop("episodes", 1)
            stage |= by


def _change(config: Settings) -> None:
    for stage in config["stages"].values():
        stage.pop("change", None)


def _evaluation_seed(config: Settings) -> None:
    assert config.pop("evaluation_seed", config["seed"]) == config["seed"]


SETTINGS = {
    "hidden_sizes": "sizes",
    "hidden_size": "size",
    "torso": "body",
    "decode_obs": "foretell_obs",
    "critic_hidden_sizes": "critic_sizes",
    "context_hidden_sizes": "context_sizes",
    "decoder_hidden_sizes": "decoder",
    "discriminator_hidden_sizes": "discriminator",
    "tau": "target_rate",
    "beta_until": "teacher_until",
}
"""Names of settings, newer to older."""

TYPES = {"dagger": "distillation", "behavior_cloning": "cloning"}
"""Short names of classes, newer to older."""


def _field_names(config: Settings) -> None:
    for algorithm in _algorithms(config):
        if algorithm.get("type") == "dagger" and "beta" in algorithm:
            algorithm["teacher"] = algorithm.pop("beta")
        if "trainable" in algorithm:
            algorithm["adapt"] = algorithm.pop("trainable")
    config |= _older(config)


def _older(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    older = {SETTINGS.get(key, key): _older(v) for key, v in value.items()}
    if older.get("type") in TYPES:
        older["type"] = TYPES[older["type"]]
    return older


def _stepwise_pearl(config: Settings) -> None:
    for algorithm in _algorithms(config):
        if algorithm["type"] == "stepwise_pearl":
            algorithm["type"] = "pearl"


OLD_SETTINGS: list[Callable[[Settings], None]] = [
    *(_stepwise_pearl, _field_names, _steps_per_shot, _by, _change, _evaluation_seed)
]
"""Functions that change a config to older names in place, for checkouts that refuse the newer."""

OLD_COLUMNS = {"shot": "adaptation_step", "column": "environment"}
"""Columns of tables, older to newer."""

OLD_NAMES: list[tuple[str, str]] = [
    (r"(\.\d{4})\.[^/]+", r"\1"),  # Fine-tuning jobs without the id of their task.
    (r"\bbody\.", "torso."),
    (r"\benv\.(next_)?chance$", r"env.\1reward_prob"),
    (r"\benv\.shown\.", "env.observed."),
    (r"\benv\.unseen$", "env.task_changed"),
    (r"\benv\.place$", "env.state"),
]
"""Names of jobs and arrays of checkpoints, as regular expressions, older to newer."""

LEFT_OUT = {"time", "run_id"}
"""Columns that differ between any two runs."""


def main() -> None:
    """Runs the cases of a plan sequentially."""
    plan, folder = Path(sys.argv[1]), Path(sys.argv[2])
    root = Path(dmrl_ray.__file__).parents[1]
    assert root == Path.cwd(), f"imported {root} instead of {Path.cwd()}"
    for name, case in json.loads(plan.read_text()).items():
        facts: Settings = {"refused": {}, "error": None}
        run_folder = folder / name / "run"
        try:
            play(case, run_folder, facts["refused"])
            np.savez(folder / f"{name}.npz", **dict(collected(run_folder)))
        except Exception:  # Reported as a difference; the other cases continue.
            facts["error"] = traceback.format_exc(limit=-3)
        (folder / f"{name}.json").write_text(json.dumps(facts))


def play(case: Settings, folder: Path, refused: dict[str, str]) -> None:
    """Runs a config without the stages that this checkout refuses, which are added to `refused`."""
    config = copy.deepcopy(case["config"])
    while config["stages"]:
        try:
            run_to_the_end(understood(config), folder, Stopping(case["stops"]))
            return
        except ConfigError as error:
            stage = re.search(r"stages\.([\w-]+)", str(error))
            if folder.exists() or stage is None or stage[1] not in config["stages"]:
                raise
            _refuse(config["stages"], stage[1], str(error).splitlines()[0], refused)


def _refuse(stages: Settings, name: str, reason: str, refused: dict[str, str]) -> None:
    """Removes a stage, and those that depend on it."""
    refused[name] = reason
    del stages[name]
    for other, stage in list(stages.items()):
        data = (stage.get("algorithm") or {}).get("data", {})
        if other in stages and name in (stage.get("init_from"), data.get("stage")):
            _refuse(stages, other, f"needs {name}", refused)


def understood(config: Settings) -> RunConfig:
    """Returns the config in the names of this checkout, those with the fewest problems.

    Raises:
        ConfigError: there are problems with all names.
    """
    best, fewest = config, _problems(config)
    for rename in OLD_SETTINGS:
        older = copy.deepcopy(best)
        rename(older)
        if fewest and (found := _problems(older)) < fewest:
            best, fewest = older, found
    return parse_config(json.dumps(best, indent=1), "case")


def _problems(config: Settings) -> int:
    try:
        parse_config(json.dumps(config, indent=1), "case")
    except ConfigError as error:
        return len(str(error).splitlines())
    return 0


class Stopping(Display):
    """Shows nothing, and stops the run at its second update if `stops`."""

    def __init__(self, stops: bool) -> None:
        super().__init__(quiet=True)
        self.stops = stops
        self.updates = 0

    def update(self, *args: Any, **kwargs: Any) -> None:
        self.updates += 1
        if self.stops and self.updates == 2:
            signal.raise_signal(signal.SIGTERM)

    def begin_again(self) -> None:
        self.updates = 0


def run_to_the_end(config: RunConfig, folder: Path, display: Stopping) -> None:
    """Runs a config, and resumes it until it is finished."""
    try:
        controller.run(config, folder, display=display)
        return
    except Interrupted:
        display.begin_again()
    while True:
        try:
            controller.resume(folder, display=display)
            return
        except Interrupted:
            display.begin_again()


def collected(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the newest checkpoint arrays of each name, and the columns of tables."""
    files: dict[str, str] = {}
    for commit in sorted((folder / "commits").glob("*.json")):
        named = json.loads(commit.read_text())["files"]
        files |= {name: file["path"] for name, file in named.items()}
    for name, path in files.items():
        for array, value in _read(folder / path).items():
            yield newer(f"weights/{name}/{array}"), value
    for table in ("tasks", "episodes", "metrics", "events", "transitions"):
        rows = load(folder, table=table).drop(columns=list(LEFT_OUT), errors="ignore")
        yield from _columns(table, rows.rename(columns=OLD_COLUMNS))


def _read(path: Path) -> dict[str, np.ndarray]:
    if path.suffix == ".safetensors":
        return safetensors.numpy.load_file(path)
    with np.load(path, allow_pickle=False) as archive:
        return dict(archive)


def _columns(table: str, rows: pd.DataFrame) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the columns of a table by job and metric, without durations."""
    keys: list[str] = []
    if "job" in rows:
        keys = ["job", "name"] if table == "metrics" else ["job"]
        rows["job"] = rows["job"].where(rows["job"] != "", rows["stage"]).map(newer)
    if "algorithm" in rows:
        rows = rows.replace({"algorithm": {old: new for new, old in TYPES.items()}})
    if table == "metrics":
        rows = rows[~rows["name"].str.match("time/|steps_per_s")]
    if table == "events":
        rows["detail"] = rows["detail"].map(_comparable)
    for key, group in rows.groupby(keys, sort=False) if keys else [((), rows)]:
        for column in group.columns.difference(keys):
            yield "/".join([table, *key, column]), _array(group[column])


def _comparable(detail: str) -> str:
    """Returns the detail without seconds and ids of runs, which differ between any two runs."""
    found = json.loads(detail)
    return json.dumps(
        {k: v for k, v in found.items() if k not in ("seconds", "runs")}, sort_keys=True
    )


def _array(column: pd.Series) -> np.ndarray:
    """Returns a column as an array of numbers or text."""
    if column.dtype == "boolean":
        return column.astype("Int8").fillna(-1).to_numpy(np.int8)
    values = column.to_numpy()
    if values.dtype != object:
        return values
    sizes = {len(value) for value in values if isinstance(value, np.ndarray)}
    if sizes:
        missing = np.full(max(sizes), np.nan)
        return np.stack([missing if value is None else value for value in values])
    return np.array(["" if value is None else str(value) for value in values], dtype=str)


def newer(name: str) -> str:
    """Returns the newer name of a job or checkpoint array."""
    for old, new in OLD_NAMES:
        name = re.sub(old, new, name)
    return name


if __name__ == "__main__":
    main()
