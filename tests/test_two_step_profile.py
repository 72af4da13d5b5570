"""Stay probabilities of recorded choices in the two-step task, by hand."""

import numpy as np
import pandas as pd
import pytest

from benchmarks.two_step import effects, profile


def steps(environment, rounds):
    """Rows of a trial of (choice, place, reward)."""
    rows = []
    for i, (choice, place, reward) in enumerate(rounds):
        arrived = np.eye(3)[place + 1].tolist()
        rows.append({"t": 2 * i, "obs": [1.0, 0, 0], "action": choice, "reward": 0.0})
        rows.append({"t": 2 * i + 1, "obs": arrived, "action": 0, "reward": reward})
    return pd.DataFrame(rows).assign(run_id="r", environment=environment, trial=0)


def test_stay_probabilities_are_those_of_each_transition_and_reward():
    # Environment 0: common and rewarded, stays; rare and rewarded, switches. Environment 1: common
    # and unrewarded, switches; rare and unrewarded, stays.
    rows = pd.concat(
        [
            steps(1, [(1, 1, 0.0), (0, 1, 0.0), (0, 0, 0.0)]),
            steps(0, [(0, 0, 1.0), (0, 1, 1.0), (1, 1, 0.0)]),
        ]
    )
    stays = profile(rows)
    np.testing.assert_array_equal(stays, [[0, 1], [1, 0]])
    assert effects(stays) == (0, 1)


def test_a_choice_by_reward_alone_has_no_interaction_with_the_transition():
    assert effects(np.array([[0.2, 0.9], [0.2, 0.9]])) == pytest.approx((0.7, 0))
