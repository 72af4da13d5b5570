"""What the recorded choices of the two-step task say, by hand."""

import numpy as np
import pandas as pd
import pytest

from benchmarks.two_step import profile, use_of


def steps(column, rounds):
    """Rows of a trial of (choice, place, reward)."""
    rows = []
    for i, (choice, place, reward) in enumerate(rounds):
        arrived = np.eye(3)[place + 1].tolist()
        rows.append({"t": 2 * i, "obs": [1.0, 0, 0], "action": choice, "reward": 0.0})
        rows.append({"t": 2 * i + 1, "obs": arrived, "action": 0, "reward": reward})
    return pd.DataFrame(rows).assign(run_id="r", column=column, trial=0)


def test_a_choice_is_met_with_where_it_led():
    # Column 0: common and paid, stays; rare and paid, leaves. Column 1: common and unpaid, leaves;
    # rare and unpaid, stays.
    rows = pd.concat(
        [
            steps(1, [(1, 1, 0.0), (0, 1, 0.0), (0, 0, 0.0)]),
            steps(0, [(0, 0, 1.0), (0, 1, 1.0), (1, 1, 0.0)]),
        ]
    )
    stays = profile(rows)
    np.testing.assert_array_equal(stays, [[0, 1], [1, 0]])
    assert use_of(stays) == (0, 1)


def test_one_who_looks_at_the_reward_alone_does_not_tell_the_ways_apart():
    assert use_of(np.array([[0.2, 0.9], [0.2, 0.9]])) == pytest.approx((0.7, 0))
