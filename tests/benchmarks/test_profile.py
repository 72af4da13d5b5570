"""The breakdown of time, by hand."""

import pandas as pd
import pytest

from benchmarks.profile import ROWS, markdown, shares, sums

SECONDS = pd.Series(
    {
        "wall": 10.0,
        "learner_wait": 6.0,
        "write": 0.5,
        "validate": 1.0,
        "learner_call": 4.0,
        "update": 3.0,
        "collect": 4.0,
        "shards": 8.0,
        "env": 4.0,
        "inference": 2.0,
    }
)


@pytest.mark.parametrize("overlapped", [False, True])
@pytest.mark.parametrize("parallel", [1, 2])
def test_every_process_spends_all_of_its_time(parallel, overlapped):
    for parts in shares(SECONDS, parallel=parallel, overlapped=overlapped).values():
        assert sum(parts.values()) == pytest.approx(1)
        assert set(parts) <= set(ROWS)


def test_the_drivers_waiting_is_divided_like_a_workers_time():
    # Two workers share 8 s, so each played for 4 of the 4.5 s that the driver waited for them.
    found = shares(SECONDS, parallel=2, overlapped=False)
    driver = {"env": 0.2, "inference": 0.1, "rest": 0.1, "learning": 0.3, "writing": 0.05}
    driver |= {"validation": 0.1, "other": 0.0}
    # 0.5 s between driver and workers, 1 s between driver and learner.
    assert found["driver"] == pytest.approx({**driver, "transfer": 0.15})
    assert found["worker"] == pytest.approx(
        {"env": 0.2, "inference": 0.1, "rest": 0.1, "waiting": 0.6}
    )
    assert found["learner"] == pytest.approx({"learning": 0.3, "waiting": 0.7})


def test_overlapped_rollouts_cost_the_driver_its_waiting_time():
    driver = shares(SECONDS, parallel=2, overlapped=True)["driver"]
    assert driver["waiting"] == pytest.approx(0.45)
    assert "env" not in driver


def test_a_run_need_not_have_validated():
    driver = shares(SECONDS.drop("validate"), parallel=2, overlapped=False)["driver"]
    assert driver["validation"] == 0
    assert sum(driver.values()) == pytest.approx(1)


def test_wall_time_is_steps_over_rate():
    # 100 steps at 50 a second and 300 more at 100: 2 + 3 s. Validation rows are no update.
    rows = [(1, 100, "steps_per_s", 50.0), (1, 100, "time/env_s", 1.0)]
    rows += [(2, 400, "steps_per_s", 100.0), (2, 400, "time/env_s", 1.5)]
    rows += [(2, 400, "time/validate_s", 0.5), (2, 400, "validation_score", 0.5)]
    metrics = pd.DataFrame(rows, columns=["policy_version", "env_steps", "name", "value"])
    assert sums(metrics).to_dict() == {"env": 2.5, "validate": 0.5, "wall": 5.0}


def test_the_table_has_a_column_for_each_process():
    lines = markdown({"driver": {"env": 0.25}, "learner": {"learning": 1.0}}).splitlines()
    assert lines[0] == "| share of time | driver | learner |"
    assert "| environments | 25.0% |  |" in lines
    assert len(lines) == 2 + len(ROWS)
