from math import comb

import numpy as np
import pytest

from dmrl_ray.envs.two_step import COMMON, HIGH, TwoStep, bayes_return, stay_probabilities
from dmrl_ray.types import Task


def played(num_envs, choose, **settings):
    """The family, and choices, second-stage states and rewards (rounds, B) of one trial.

    `choose` takes the environment, the previous choice and its reward.
    """
    family = TwoStep(TwoStep.Config(**settings))
    env = family.make_vec(num_envs)
    env.np_random = np.random.default_rng(0)
    env.tracks_belief = True
    env.set_tasks(family.sample(np.random.default_rng(1), num_envs, "test"))
    env.reset()
    rows = []
    choice, reward = np.zeros(num_envs, np.int64), np.ones(num_envs)
    for _ in range(family.config.rounds):
        choice = choose(env, choice, reward)
        env.step(choice)
        state = env.state - 1
        reward = env.step(choice)[1]
        rows.append((choice, state, reward))
    return family, *(np.array(part) for part in zip(*rows, strict=True))


def expert(env, choice, reward):
    return env.expert_action()


def win_stay(env, choice, reward):
    return np.where(reward > 0, choice, 1 - choice)


def test_the_return_of_the_expert_action_is_the_reference():
    family, *_, reward = played(5000, expert)
    total = reward.sum(axis=0)
    reference = family.reference(Task("a", "two_step", "test", {})).oracle[0]
    assert total.mean() == pytest.approx(reference, abs=4 * total.std() / np.sqrt(5000))


def test_without_reversals_the_optimum_is_a_sum_of_binomials():
    # After t rounds the state with more evidence is the better one with its posterior probability;
    # it is reached with probability 0.75, and then rewarded with 0.9.
    total = 0.0
    for t in range(30):
        for k in range(t + 1):
            first = comb(t, k) * HIGH**k * (1 - HIGH) ** (t - k) / 2
            second = comb(t, k) * HIGH ** (t - k) * (1 - HIGH) ** k / 2
            reached = COMMON * max(first, second) + (1 - COMMON) * min(first, second)
            total += HIGH * reached + (1 - HIGH) * (first + second - reached)
    assert bayes_return(30, 0.0) == pytest.approx(total, abs=0.03)


def test_the_expert_has_the_model_based_profile():
    # The choice is repeated if rewarded after a common transition or unrewarded after a rare one.
    stay = stay_probabilities(*played(2000, expert)[1:])
    assert stay[0, 1] > 0.9
    assert stay[1, 0] > 0.9
    interaction = stay[0, 1] - stay[0, 0] - stay[1, 1] + stay[1, 0]
    assert interaction > 0.5


def test_repeating_rewarded_choices_has_the_model_free_profile():
    stay = stay_probabilities(*played(2000, win_stay, rounds=30)[1:])
    np.testing.assert_allclose(stay, [[0, 1], [0, 1]])


def test_the_posterior_by_hand():
    # A reward in state 0: 0.9, and 0.9 x 0.975 + 0.1 x 0.025 after a possible reversal.
    env = TwoStep(TwoStep.Config()).make_vec(200)
    env.np_random = np.random.default_rng(0)
    env.tracks_belief = True
    env.set_tasks([Task("a", "b", "train", {"better": np.zeros(100)})] * 200)
    env.reset()
    env.step(np.zeros(200, np.int64))
    first = env.state == 1
    assert first.mean() == pytest.approx(COMMON, abs=0.1)
    rewarded = env.step(np.zeros(200, np.int64))[1] > 0
    assert rewarded[first].mean() == pytest.approx(HIGH, abs=0.1)
    posterior = np.where(rewarded == first, 0.9, 0.1)
    np.testing.assert_allclose(env.belief()[:, 0], 0.95 * posterior + 0.025, rtol=1e-6)
    np.testing.assert_allclose(env.belief()[:, 1], posterior, rtol=1e-6)


def test_reversals_have_the_given_probability():
    tasks = TwoStep(TwoStep.Config()).sample(np.random.default_rng(0), 2000, "train")
    better = np.array([task.params["better"] for task in tasks])
    assert np.abs(np.diff(better, axis=1)).mean() == pytest.approx(0.025, abs=0.002)
    assert better[:, 0].mean() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("settings", [{"reversal": 0}, {"rounds": 2}, {"reversal": 1e-5}])
def test_too_few_sequences_are_not_split(settings):
    with pytest.raises(ValueError, match=r"held_out: .* too few sequences to be split"):
        TwoStep(TwoStep.Config.model_validate({"held_out": 0.2, **settings}))


def test_scores_are_undefined_where_nothing_can_be_learned():
    # With reversals of probability 1/2 no policy is better than random.
    family = TwoStep(TwoStep.Config(rounds=30, reversal=0.5))
    ends = family.reference(family.sample(np.random.default_rng(0), 1, "test")[0])
    assert not ends.is_scorable
    assert np.isnan(ends.score(np.array(0), np.array(20.0)))
