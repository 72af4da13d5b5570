"""Every cell of the matrix keeps the laws of a run, or is refused in one sentence.

A cell is one choice of each of the contract's options (`tests.matrix_cells`). By default enough
cells are played that every two choices meet in one of them; all are, where slow tests are.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from dmrl_ray.config.loading import parse_config
from dmrl_ray.control import controller
from dmrl_ray.errors import ConfigError
from dmrl_ray.results.display import Display
from dmrl_ray.results.reading import load
from tests.matrix_cells import (
    ALGORITHMS,
    AXES,
    BELIEFS,
    COPIES,
    GRADIENTS,
    PLAYERS_OF_TRIALS,
    Cell,
    Played,
    config_of,
    more_cells,
    numbers,
    pairwise,
    product,
    weights_of,
)
from tests.matrix_family import EPISODES, LIMIT, SHORT

REFUSED: list[tuple[Callable[[Cell], bool], str]] = [
    (
        lambda c: (
            c.algorithm in {"sac", *BELIEFS} and (c.memory == "memory" or c.seen == "picture")
        ),
        "learn from single steps with vectors to see",
    ),
    (lambda c: c.algorithm == "varibad" and c.memory == "no_memory", "one that keeps a belief"),
    (lambda c: c.algorithm == "dpt" and c.memory == "no_memory", "needs one with memory"),
    (lambda c: c.algorithm == "dpt" and c.acts == "continuous", "discrete actions only"),
    (
        lambda c: c.algorithm == "varibad" and c.stage == "continue",
        "gradient steps cannot adapt a belief",
    ),
    (lambda c: c.algorithm == "dpt" and c.stage == "continue", "dpt acts by asking"),
    (
        lambda c: c.algorithm in {"behavior_cloning", "autoencoder", "vae"} and c.stage == "adapt",
        "has no adaptation of its own",
    ),
]
"""Cells that cannot be run, and what the sentence says that refuses them."""


def refusal(cell: Cell) -> str | None:
    """What the sentence says that refuses a cell; None where it runs."""
    return next((says for applies, says in REFUSED if applies(cell)), None)


# What a run keeps, each a function of what it left; the docstring is the claim.


def finite(played: Played) -> None:
    """Weights, the learner's state, metrics and rows hold finite numbers alone."""
    for name, arrays in weights_of(played.folder).items():
        for key, array in arrays.items():
            if key.endswith("/success"):  # of open episodes, whose family may not know it
                continue
            assert array.dtype.kind != "f" or np.isfinite(array).all(), f"{name}: {key}"
    metrics = played.metrics  # There is no interval where one stream alone is left.
    metrics = metrics[~(metrics["name"].str.endswith(("_low", "_high")) & metrics["value"].isna())]
    for rows in (played.episodes, metrics, played.steps):
        assert np.isfinite(numbers(rows)).all()


def lengths(played: Played) -> None:
    """An episode's length is the environment's own: the walk's return says it."""
    length = played.episodes["length"].to_numpy()
    assert len(length)
    np.testing.assert_array_equal(length, np.rint(played.episodes["return"]))
    if played.cell.lengths == "fixed":
        assert (length == LIMIT).all()
    else:
        assert SHORT <= length.min() < LIMIT
        assert length.max() <= LIMIT


def steps(played: Played) -> None:
    """Steps that count are the recorded ones, and those of the budget cover them."""
    counted = played.training.query("stage == 'meta'")["length"].sum()
    budget = played.metrics.query("stage == 'meta'")["env_steps"].max()
    whole_trials = played.cell.algorithm in PLAYERS_OF_TRIALS
    assert counted <= budget
    if whole_trials and played.cell.lengths == "fixed":
        assert counted == budget
    if played.cell.stage != "record":
        return
    held_out = played.steps.query("stage == 'held_out'")
    assert len(held_out) == played.episodes.query("stage == 'held_out'")["length"].sum()
    trained = played.steps.query("stage == 'meta'")
    if len(trained):
        assert len(trained) == (counted if whole_trials else budget)
    if not whole_trials:  # Its episodes go on from one collection to the next.
        trained = trained.assign(trial=0)
    for rows in (held_out, trained):
        t = rows.groupby(["trial", "environment", "episode"])["t"].agg(["max", "nunique", "size"])
        assert (t["max"] + 1 == t["nunique"]).all()
        assert (t["nunique"] == t["size"]).all()


def trials(played: Played) -> None:
    """A task has exactly the episodes that the settings say, whatever their lengths."""
    algorithm = played.cell.algorithm
    if algorithm in PLAYERS_OF_TRIALS:
        rollouts = 2 if algorithm in GRADIENTS else 1
        assert len(played.training)
        by_trial = played.training.groupby(["job", "trial", "task_id"])
        for _, episodes in by_trial:
            _check_trial(algorithm, episodes, rollouts)
    by_trial = played.playing.groupby(["stage", "policy_version", "trial", "task_id"])
    for _, episodes in by_trial:
        _check_trial(algorithm, episodes, 2)
    held_out = played.playing.query("stage == 'held_out'")
    assert len(held_out.groupby(["trial", "task_id"])) in (0, 3 * 2)
    streams = played.online.groupby(["trial", "task_id"])
    for _, episodes in streams:
        own = 20 if algorithm in {"ppo", "impala", "appo", "sac", "gail"} else 1
        copies = COPIES if played.cell.stage == "continue" or algorithm in GRADIENTS else own
        assert len(episodes) == 2 * copies
    assert len(streams) in (0, 2 * 2)


def _check_trial(algorithm: str, episodes: pd.DataFrame, rollouts: int) -> None:
    """One trial on one task; `rollouts` of gradient-based methods."""
    updates = episodes["policy_version"] * (episodes["stage"] == "special")  # of the same task
    at = (episodes["adaptation_step"] - updates).value_counts().to_dict()
    if algorithm == "maml_within":
        assert len(episodes) == EPISODES * COPIES
    elif algorithm in GRADIENTS:
        assert len(episodes) == rollouts * COPIES
        assert at == dict.fromkeys(range(rollouts), COPIES)
    else:
        assert len(episodes) == EPISODES
        assert algorithm != "pearl" or at == {0: 1, 1: 1}


def versions(played: Played) -> None:
    """An episode names the version of the policy that acted in it."""
    trained = played.training.query("stage == 'meta'")
    np.testing.assert_array_equal(trained["policy_version"], trained["trial"])
    special = played.training.query("stage == 'special'")
    np.testing.assert_array_equal(special["policy_version"], special["trial"])
    updates = played.metrics.query("stage == 'meta'")["policy_version"].max()
    assert updates >= 2
    validated = played.playing.query("stage == 'meta'")
    assert sorted(validated["policy_version"].unique()) == list(range(1, updates + 1))
    later = played.episodes.query("stage in ['held_out', 'stream']")
    assert (later["policy_version"] == updates).all()
    recorded = played.steps.query("stage == 'meta'")
    np.testing.assert_array_equal(recorded["policy_version"], recorded["trial"])
    assert (played.steps.query("stage == 'held_out'")["policy_version"] == updates).all()


def experience(played: Played) -> None:
    """Steps and episodes that an agent had on a task before an episode are those it had."""
    keys = ["stage", "job", "policy_version", "trial", "task_id"]
    rows = pd.concat([played.playing, played.online])
    if played.cell.algorithm in PLAYERS_OF_TRIALS:
        rows = pd.concat([rows, played.training.query("stage == 'meta'")])
    assert len(rows)
    for _, episodes in rows.groupby(keys):
        before = episodes["experience_episodes"].to_numpy()
        had = episodes["experience_steps"].to_numpy()
        assert before.min() == 0
        for number, done in zip(before, had, strict=True):
            earlier = before < number
            if played.cell.algorithm == "maml_within":  # Copies are not at one episode's end.
                assert number <= earlier.sum()
                continue
            assert earlier.sum() == number
            assert done == episodes["length"].to_numpy()[earlier].sum()
    special = played.training.query("stage == 'special'")
    if played.cell.algorithm not in PLAYERS_OF_TRIALS:
        return
    for (job, update), episodes in special.groupby(["job", "policy_version"]):
        earlier = special[(special["job"] == job) & (special["policy_version"] < update)]
        assert episodes["experience_episodes"].min() == len(earlier)
        assert episodes["experience_steps"].min() == earlier["length"].sum()


def resume(played: Played) -> None:
    """A run that was ended in its middle and resumed is the run that was not."""
    controller.resume(played.copy, display=Display(quiet=True))
    for table in ("episodes", "metrics", "tasks", "transitions"):
        pd.testing.assert_frame_equal(*(_rows(f, table) for f in (played.copy, played.folder)))
    for (name, arrays), (other, expected) in zip(
        *(sorted(weights_of(folder).items()) for folder in (played.copy, played.folder)),
        strict=True,
    ):
        assert name == other
        for key, array in expected.items():
            np.testing.assert_array_equal(arrays[key], array)


def _rows(folder: Path, table: str) -> pd.DataFrame:
    rows = load(folder, table=table)
    if table == "metrics":
        rows = rows[~rows["name"].str.contains("time/|steps_per_s")]
    return rows.drop(columns=["run_id", "time"], errors="ignore").reset_index(drop=True)


LAWS = {f.__name__: f for f in (finite, lengths, steps, trials, versions, experience, resume)}


def cases(cells: list[Cell], *more: pytest.MarkDecorator) -> list[object]:
    """Cells that run with every law, those of a cell one after the other."""
    return [
        pytest.param(cell, law, id=f"{cell}-{law}", marks=more)
        for cell in cells
        if refusal(cell) is None
        for law in LAWS
    ]


def refusals(cells: list[Cell], *more: pytest.MarkDecorator) -> list[object]:
    """Cells that do not run."""
    return [
        pytest.param(cell, id=str(cell), marks=more) for cell in cells if refusal(cell) is not None
    ]


FEW = [*pairwise(product(), lambda cell: refusal(cell) is not None), *more_cells()]
REST = [cell for cell in product(*ALGORITHMS) if cell not in set(FEW)]
newest: dict[Cell, Played] = {}


@pytest.fixture(autouse=True)
def _runs_are_quick(monkeypatch):
    """Nobody cuts the power here, nor asks for versions: both would be most of the time."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    monkeypatch.setattr(controller, "facts", lambda config: {})


@pytest.mark.parametrize(("cell", "law"), cases(FEW) + cases(REST, pytest.mark.slow))
def test_every_cell_keeps_the_law(cell, law, tmp_path):
    if cell not in newest:
        newest.clear()
        newest[cell] = Played(cell, tmp_path)
    LAWS[law](newest[cell])


@pytest.mark.parametrize("cell", refusals(FEW) + refusals(REST, pytest.mark.slow))
def test_what_cannot_run_is_refused_in_one_sentence(cell):
    with pytest.raises(ConfigError, match=refusal(cell)) as error:
        controller.check(parse_config(config_of(cell), "cell.yaml"))
    assert "\n" not in str(error.value)


def test_every_two_choices_meet_in_one_of_the_few_cells():
    for one, other in itertools.combinations(AXES, 2):
        met = {(getattr(cell, one), getattr(cell, other)) for cell in FEW}
        assert met >= set(itertools.product(AXES[one], AXES[other]))
