"""The figures of the benchmark of a device."""

import pytest

from benchmarks import device


@pytest.mark.parametrize("place", ["cpu", "numpy"])
def test_time_is_of_the_updates_after_the_warm_up(place, monkeypatch):
    ticks = iter(range(100))  # A second passes between any two looks at the clock ...
    monkeypatch.setattr(device, "perf_counter", lambda: float(next(ticks)))
    monkeypatch.setitem(device.TASKS, "point_goal", short(device.TASKS["point_goal"]))
    figures = device.measure("point_goal", place, num_envs=4, seconds=5)
    # ... three in an iteration: one collects and one updates, so that three are needed.
    assert figures["updates"] == 3
    assert (figures["collect"], figures["update"]) == (0.5, 0.5)
    assert figures["sps"] == 3 * 4 * 5 / 6
    assert figures["device"] == place


def short(task):
    family, encoder, algorithm = task
    return family | {"horizon": 5}, encoder, algorithm | {"num_steps": 5}
