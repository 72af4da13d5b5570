"""The figures of a comparison, by hand; both sides have the same settings."""

import importlib

import pytest

from benchmarks.against.__main__ import (
    COLUMNS,
    TASKS,
    cells,
    comparable,
    line,
    ratios,
    score,
    with_costly_steps,
)
from benchmarks.against.jitted import newest
from benchmarks.against.match import Clock, fail_on_missing, match
from benchmarks.against.one import PEERS
from benchmarks.throughput.rows import ROWS


def figures(sps, cpu, to_target=3.0, final=480.0):
    both = {"sps": sps, "cpu_us_per_step": cpu, "to_target_s": to_target}
    return {**both, "final_return": final}


def test_settings_are_those_of_the_row():
    cartpole, bandit = match("cartpole", 1, 1), match("bandit_n10", 1, 1)
    assert (cartpole.hidden, cartpole.memory, cartpole.lr) == ((64, 64), 0, 1e-3)
    assert (cartpole.num_envs, cartpole.num_steps, cartpole.batch) == (128, 128, 16_384)
    assert (bandit.hidden, bandit.memory, bandit.batch) == ((), 128, 10_240)
    assert (bandit.gae_lambda, bandit.epochs, bandit.minibatches) == (0.3, 4, 4)


def test_a_ratio_is_of_one_round():
    # 200 / 100 and 300 / 200 and 250 / 100.
    mine, theirs = [200.0, 300.0, 250.0], [100.0, 200.0, 100.0]
    found = ratios([figures(x, 1.0) for x in mine], [figures(x, 1.0) for x in theirs])
    assert found == {"median": 2.0, "spread": 0.5, "known": 3}


def test_variants_that_do_other_work_are_not_compared():
    kept = {
        name: [n for n, v in ROWS[name].variants.items() if comparable(ROWS[name], v)]
        for name in TASKS
    }
    assert "0 workers, no Ray" in kept["bandit_n10"]
    assert "0 workers, bfloat16, 4 threads, 2048 envs" not in kept["bandit_n10"]
    assert "compiled, bfloat16" in kept["cartpole"]
    assert "compiled, bfloat16, 64 steps" not in kept["cartpole"]
    assert "0 workers, symmetric" not in kept["bandit_n10"]


def test_an_expensive_environment_makes_both_alike():
    assert with_costly_steps(20.0, 120.0) == {
        0: 6.0,
        100: pytest.approx(220 / 120),
        1000: pytest.approx(1120 / 1020),
        10_000: pytest.approx(10_120 / 10_020),
    }


def test_a_score_is_0_for_the_random_policy_and_1_for_the_best_known():
    # Bandits of 5 arms and 10 pulls: 5 at random, 6.660 at best.
    assert score("bandit_n10", 5.0) == pytest.approx(0, abs=0.01)
    assert score("bandit_n10", 6.66) == pytest.approx(1, abs=0.01)
    assert score("bandit_n10", None) is None


def test_the_table_shows_both_sides():
    mine, theirs = [figures(200.0, 10.0)] * 2, [figures(100.0, 50.0, None, 22.25)] * 2
    found = line("cartpole", "sb3", "2 workers", mine, theirs)
    row = cells(found)
    assert len(row) == len(COLUMNS)
    assert row[2:5] == ["sb3", "2 (spread 0%)", "10 (spread 0%)"]
    assert row[7] == "not in 2 of 2 runs"
    assert row[-1] == "0"
    assert found["cpu_ratio_by_env_us"][0] == 5


def test_the_newest_episodes_count_when_there_are_enough():
    # Sums and numbers of iterations, oldest first: (1 + 6) / (1 + 2).
    ended = [(100.0, 5), (6.0, 2), (1.0, 1)]
    assert newest(ended, 3) == pytest.approx(7 / 3)
    assert newest(ended[1:], 4) is None


def test_a_clock_waits_for_the_target(monkeypatch):
    settings = match("cartpole", 10, 30)
    monkeypatch.setattr("time.monotonic", lambda: 0.0)
    clock = Clock(settings)
    for now in range(1, 40):
        monkeypatch.setattr("time.monotonic", lambda now=now: float(now))
        if clock.update(100 * now, 500.0 if now >= 20 else None):
            break
    found = clock.figures()
    # From the first update, at 1 s: warm-up until 3 s, stopped by the target at 20 s.
    assert (now, found["sps"], found["to_target_s"]) == (20, 100.0, 20.0)


@pytest.mark.parametrize("peer", PEERS)
def test_a_peer_names_the_packages_it_needs(peer):
    assert importlib.import_module(f"benchmarks.against.{peer}").NEEDS


def test_a_missing_peer_is_one_sentence():
    with pytest.raises(SystemExit, match="nowhere must be installed") as error:
        fail_on_missing(["math", "nowhere"])
    assert str(error.value).count("\n") == 0


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("peer", PEERS)
def test_a_peer_can_be_measured(peer, task):
    module = importlib.import_module(f"benchmarks.against.{peer}")
    for name in module.NEEDS:
        pytest.importorskip(name)
    if peer == "rllib":
        pytest.importorskip("ray")
    found = module.train(match(task, 1.0, 1.0)).figures()
    assert found["sps"] > 0
