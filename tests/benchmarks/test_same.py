"""Differences between two checkouts, and translation of renamed settings."""

import copy
import shutil
from pathlib import Path

import numpy as np
import pytest

from benchmarks.same.__main__ import plan, same
from benchmarks.same.cases import CASES, GYM_CASES, without
from benchmarks.same.differences import Found, compare, identical
from benchmarks.same.side import OLD_SETTINGS, collected, newer, play, understood
from dmrl_ray.config.components import SHORT_NAMES
from dmrl_ray.errors import ConfigError

ROOT = Path(__file__).parents[2]
AFTER = ("tuned", "online", "held_out", "sampled")


def case(name, **algorithm):
    config = copy.deepcopy(without(CASES[name], *AFTER))
    config["algorithm"] |= algorithm
    return {"config": config, "stops": False}


def arrays_of(folder, played):
    refused = {}
    play(played, folder, refused)
    assert refused == {}
    return dict(collected(folder))


def found_in(old, new):
    found = Found()
    compare("c", old, new, found)
    return found


def difference(old, new, name="weights/f/w"):
    (line,) = found_in({name: np.array(old)}, {name: np.array(new)}).lines["c"]
    return line


@pytest.fixture(scope="module")
def ppo(tmp_path_factory):
    return arrays_of(tmp_path_factory.mktemp("ppo") / "run", case("ppo"))


def test_a_checkout_differs_from_its_copy_where_the_copy_was_changed_and_nowhere_else(tmp_path):
    for folder in ("dmrl_ray", "envs"):
        unread = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=unread)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    file = tmp_path / "dmrl_ray" / "algorithms" / "rl2.py"
    changed = file.read_text().replace(
        "lr: float = Field(default=2e-3", "lr: float = Field(default=3e-3"
    )
    assert changed != file.read_text()
    file.write_text(changed)
    found = same(ROOT, tmp_path, {"ppo": case("ppo"), "rl2": case("rl2_informative")})
    assert list(found.lines) == ["rl2"], found.report()
    assert any(line.startswith("weights/trained.last: ") for line in found.lines["rl2"])
    assert found.compared > 100


def test_a_learning_rate_shows_in_weights_optimiser_and_tables(ppo, tmp_path):
    other = arrays_of(tmp_path / "run", case("ppo", lr=1.1e-3))
    headings = {line.split(":")[0] for line in found_in(ppo, other).lines["c"]}
    assert {"weights/trained.learner", "weights/trained.last", "metrics/trained"} <= headings


def test_a_stopped_and_resumed_run_equals_an_uninterrupted_one(ppo, tmp_path):
    stopped = arrays_of(tmp_path / "run", case("ppo") | {"stops": True})
    assert "job_resumed" in stopped["events/trained/event"]
    kept = {name: array for name, array in ppo.items() if not name.startswith("events/")}
    assert found_in(kept, {name: stopped[name] for name in kept}).lines == {}


def test_arrays_of_a_run_include_optimisers_and_shards(ppo):
    assert any(name.startswith("weights/trained.learner/optimizer") for name in ppo)
    assert any(name.startswith("weights/trained.shards/") for name in ppo)


def test_times_and_names_of_runs_are_left_out(ppo):
    assert not [
        n for n in ppo if "time" in n.split("/") or n.endswith(("run_id", "steps_per_s/value"))
    ]


def test_settings_are_given_in_the_names_that_a_checkout_has():
    # Each case needs some of the older names, or none: whichever leave no problem.
    for name in CASES:
        understood(CASES[name])


def test_older_names_of_settings_are_equivalent():
    algorithm = {"type": "maml", "steps_per_adaptation": 2}
    by = {"type": "continued", "optimizer": "adamw", "lr": 1, "weight_decay": 0.01, "episodes": 4}
    config = {
        "seed": 7,
        "evaluation_seed": 7,
        "algorithm": algorithm,
        "stages": {"a": {"type": "adapt", "by": by, "change": "ignore"}},
    }
    for rename in OLD_SETTINGS:
        rename(config)
    assert config.keys() == {"seed", "algorithm", "stages"}
    assert config["algorithm"] == {"type": "maml", "steps_per_shot": 2}
    assert config["stages"]["a"] == {
        "type": "adapt",
        "optimizer": "adamw",
        "lr": 1,
        "episodes_per_update": 4,
    }


def test_a_setting_under_no_known_name_is_refused():
    config = copy.deepcopy(CASES["ppo"])
    config["algorithm"]["clipp"] = 0.2
    with pytest.raises(ConfigError, match="clipp"):
        understood(config)


def test_a_stage_that_is_refused_is_left_out_with_those_that_need_it(tmp_path):
    config = without(CASES["ppo"], "online", "held_out", "sampled")
    soft = {"type": "sac", "gradient_steps": 1}  # It does not correct for lag.
    trained, tuned = config["stages"]["trained"], config["stages"]["tuned"]
    other = {**trained, "algorithm": soft, "max_policy_lag": 1}
    config["stages"] |= {"other": other, "special": {**tuned, "init_from": "other"}}
    refused = {}
    play({"config": config, "stops": False}, tmp_path / "run", refused)
    assert list(refused) == ["other", "special"]
    assert any(name.startswith("weights/tuned.") for name, _ in collected(tmp_path / "run"))


def test_jobs_and_weights_are_named_without_the_ids_of_tasks():
    assert newer("weights/tuned.0001.test-1f/encoder.layers.0.weight") == (
        "weights/tuned.0001/encoder.layers.0.weight"
    )
    for kept in ("weights/tuned.0001/w", "weights/trained.best/w", "online.restarted"):
        assert newer(kept) == kept


def test_the_size_of_a_difference_is_reported():
    assert difference([1.0, 2.0, 3.0], [1.0, 2.5, 2.0]) == "weights/f: w by up to 1 in 2 of 3"
    assert difference([1.0, np.nan], [np.nan, np.nan]) == "weights/f: w in 1 of 2, NaN on one side"
    assert difference([0.0], [-0.0]) == "weights/f: w has other signs of 0 or bits of NaN"
    assert difference([1.0], [[1.0]]) == "weights/f: w has shape (1,) in OLD, (1, 1) in NEW"
    assert difference([1], [1.0]) == "weights/f: w is int64 in OLD, float64 in NEW"
    assert difference([True], [False]) == "weights/f: w by up to 1 in 1 of 1"
    assert (
        difference(["a", "b"], ["a", "xyz"])
        == "weights/f: w in 1 of 2, first 'b' in OLD, 'xyz' in NEW"
    )


def test_every_bit_counts_but_not_the_width_of_text():
    assert identical(np.array([np.nan]), np.array([np.nan]))
    assert identical(np.array(["a", "b"]), np.array(["a", "b"], dtype="U9"))
    assert not identical(np.float64([1]), np.float32([1]))
    assert not identical(np.array([1.0]), np.nextafter([1.0], 2))


def test_differences_are_counted_over_cases():
    found = Found()
    for name, value in (("a", 1), ("b", 2), ("c", 0)):
        old = {"episodes/tuned.0001/return": np.zeros(1), "weights/tuned.0001/w": np.zeros(1)}
        compare(name, old, {key: array + value for key, array in old.items()}, found)
    assert found.kinds == {"episodes.return": {"a", "b"}, "weights of tuned": {"a", "b"}}
    assert "cases by difference: episodes.return 2, weights of tuned 2" in found.report()


def test_rows_in_another_order_are_one_line():
    old = {"episodes/s/length": np.array([1, 2, 2]), "episodes/s/return": np.array([5.0, 6.0, 7.0])}
    new = {name: array[[2, 0, 1]] for name, array in old.items()}
    assert found_in(old, new).lines["c"] == ["episodes/s: the same rows in another order"]
    new["episodes/s/return"] = new["episodes/s/return"][[1, 0, 2]]  # no longer the same rows
    assert "length" in found_in(old, new).lines["c"][0]


def test_columns_and_metrics_of_one_side_do_not_count_but_weights_and_stages_do():
    old = {"episodes/s/return": np.zeros(2), "weights/f/a": np.zeros(2)}
    new = old | {"episodes/s/cost": np.zeros(2), "metrics/s/loss/value": np.zeros(1)}
    found = found_in(old, new)
    assert found.lines == {}
    assert found.only["NEW"] == {"episodes.cost", "metric loss"}
    assert found_in(old, {"weights/f/a": np.zeros(2)}).lines["c"] == ["episodes/s: only in OLD"]
    assert found_in(old, new | {"weights/f/b": np.zeros(1)}).lines["c"] == [
        "weights/f: b only in NEW"
    ]


def test_every_algorithm_has_a_case():
    named = set()
    for config in CASES.values():
        named |= {
            part["algorithm"]["type"]
            for part in (config, *config["stages"].values())
            if part.get("algorithm")
        }
    assert named == {n for n in SHORT_NAMES["algorithm"] if not n.startswith("rllib:")}


def test_everything_adds_ray_resuming_and_gymnasium():
    names = plan(True).keys() - plan(False).keys()
    assert {"maml_on_ray", "maml_resumed", *GYM_CASES} <= names
    assert all(c["config"]["workers"]["num"] == 0 for c in plan(False).values())
