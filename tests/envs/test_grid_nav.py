import numpy as np
import pytest

from dmrl_ray.envs.grid_nav import CELLS, GOALS, HORIZON, NEXT_CELL, GridNav
from dmrl_ray.types import SPLITS, Task

# A sweep over 14 goals, one at each of the steps 2 to 15, and the shortest path along the bottom
# and up the right edge, on which the other 7 lie.
SWEEP = [(0, 1), (0, 2), (0, 3), (0, 4), (1, 4), (1, 3), (1, 2), (2, 2), (2, 1), (3, 1), (3, 2)]
SWEEP += [(3, 3), (2, 3), (2, 4), (3, 4)]
EDGE = [(1, 0), (2, 0), (3, 0), (4, 0), (4, 1), (4, 2), (4, 3), (4, 4)]


def cell(place):
    return place[0] + 5 * place[1]


def action_towards(here, there):
    return int(np.flatnonzero(NEXT_CELL[here] == there)[0])


def shortest(here, goal):
    (x, y), (gx, gy) = CELLS[here], CELLS[goal]
    if x != gx:
        return cell((x + np.sign(gx - x), y))
    return cell((x, y + np.sign(gy - y)))


def searching_return(goal):
    """Returns (4,) of an agent that sweeps, then follows the edge, then goes to the found goal."""
    env = GridNav(GridNav.Config()).make_vec(1)
    env.set_tasks([Task("a", "grid_nav", "train", {"goal": float(goal)})])
    env.reset()
    known, total = None, np.zeros(4)
    for episode in range(4):
        here, path = 0, iter(SWEEP if episode == 0 else EDGE)
        for _ in range(HORIZON):
            following = shortest(here, known) if known is not None else cell(next(path))
            reward = env.step(np.array([action_towards(here, following)]))[1][0]
            here = following
            known = here if reward > 0 else known
            total[episode] += reward
    return total


def reference(family, split="test"):
    return family.reference(family.sample(np.random.default_rng(0), 1, split)[0])


def test_a_search_policy_attains_the_bayes_optimal_return():
    # `search` argues that it is an upper bound; here a policy attains it in the environment.
    returns = np.mean([searching_return(goal) for goal in GOALS], axis=0)
    oracle = reference(GridNav(GridNav.Config())).oracle
    np.testing.assert_allclose(returns, oracle, atol=1e-5)
    np.testing.assert_allclose(oracle, [4.0, 11.0714, 11.0714, 11.0714], atol=1e-4)


def test_the_expert_action_attains_the_bayes_optimal_return():
    env = GridNav(GridNav.Config()).make_vec(21)
    env.tracks_belief = True
    env.set_tasks([Task("a", "grid_nav", "train", {"goal": float(goal)}) for goal in GOALS])
    env.reset()
    reward = np.array([env.step(env.expert_action())[1] for _ in range(4 * HORIZON)], np.float64)
    returns = reward.reshape(4, HORIZON, 21).sum(axis=1).mean(axis=1)
    np.testing.assert_allclose(returns, [4.0, 11.0714, 11.0714, 11.0714], atol=1e-4)
    assert returns.sum() == pytest.approx(37.214, abs=1e-3)


def test_the_expert_stays_on_a_goal_and_continues_its_search_elsewhere():
    env = GridNav(GridNav.Config()).make_vec(1)
    env.tracks_belief = True
    env.set_tasks([Task("a", "grid_nav", "train", {"goal": 3.0})])
    env.reset()
    for action in [1, 1]:  # to the cell 2, which is not the goal
        env.step(np.array([action]))
    assert env.belief()[0, 2] == 0
    assert env.belief()[0, 3] == pytest.approx(1 / 20)
    assert env.expert_action()[0] == 3  # of the neighbors 7 and 3 the sweep has 7 first
    env.step(np.array([1]))
    assert env.belief()[0, [3, 25]].tolist() == [1, 1]
    assert env.expert_action()[0] == 0


def test_no_walk_finds_more_in_the_first_episode():
    # Independent of the argument in `search`: the best expected return of one episode by
    # search over the set of walks, merged by (cell, goals seen), pruned by the bound that every
    # further step finds another goal.
    goal_bit = {int(g): 1 << i for i, g in enumerate(GOALS)}
    found_at = [HORIZON + 1 - t + 0.1 * (HORIZON + 1 - t) for t in range(1, HORIZON + 1)]
    layer, best = {(0, 0): 0.0}, 0.0
    target = (4.0 + 0.1 * HORIZON) * len(GOALS)  # the sum over goals, above finding nothing
    for t in range(HORIZON):
        following = {}
        for (here, seen), value in layer.items():
            for there in {int(c) for c in NEXT_CELL[here]}:
                bit = goal_bit.get(there, 0)
                gain = found_at[t] if bit and not seen & bit else 0.0
                if value + gain + sum(found_at[t + 1 :]) < target - 1e-9:
                    continue
                key = (there, seen | bit)
                following[key] = max(following.get(key, 0.0), value + gain)
        layer = following
    best = max(layer.values()) / len(GOALS) - 0.1 * HORIZON
    assert best == pytest.approx(4.0)


def test_random_return_is_that_of_random_play():
    family = GridNav(GridNav.Config())
    env = family.make_vec(20_000)
    rng = np.random.default_rng(0)
    env.set_tasks(family.sample(rng, 20_000, "train"))
    env.reset()
    total = sum(env.step(rng.integers(5, size=20_000))[1] for _ in range(HORIZON))
    random = reference(family).random
    assert random.sum() == pytest.approx(-4.64, abs=0.03)
    assert total.mean() == pytest.approx(random[0], abs=5 * total.std() / np.sqrt(20_000))


def test_moves_stop_at_the_walls_and_the_goal_does_not_end_the_episode():
    env = GridNav(GridNav.Config()).make_vec(1)
    env.set_tasks([Task("a", "grid_nav", "train", {"goal": 2.0})])
    env.reset()
    steps = [env.step(np.array([action])) for action in [2, 4, 1, 1, 0, 1]]  # left, down, right...
    assert [int(step[0][0].argmax()) for step in steps] == [0, 0, 1, 2, 2, 3]
    np.testing.assert_allclose([step[1][0] for step in steps], [-0.1, -0.1, -0.1, 1, 1, -0.1])
    assert not any(step[2][0] or step[3][0] for step in steps)


def test_held_out_goals_divide_the_cells():
    family = GridNav(GridNav.Config(held_out=4))
    parts = [family.goals(split) for split in SPLITS]
    assert [len(part) for part in parts] == [13, 4, 4]
    assert sorted(np.concatenate(parts)) == sorted(GOALS)


def test_without_held_out_cells_every_split_draws_from_all():
    family = GridNav(GridNav.Config())
    for split in SPLITS:
        tasks = family.sample(np.random.default_rng(0), 500, split)
        assert {task.params["goal"] for task in tasks} == set(GOALS)


def best_return(goals, episodes):
    """The best expected return of a trial by backward induction over all walks, with the state
    (cell, goals not yet excluded)."""
    sets = np.arange(1 << len(goals))
    count = np.array([bits.bit_count() for bits in sets.tolist()])
    future = np.zeros(len(sets))  # value of later episodes, summed over the goals not excluded
    for later in range(episodes):
        value = np.tile(future - 0.1 * HORIZON * count, (len(CELLS), 1))
        for t in range(HORIZON, 0, -1):
            for i, goal in enumerate(goals):
                left = sets[(sets >> i & 1) > 0]
                found = 16.1 - 1.1 * t + later * (16.1 - 1.1 * CELLS[goal].sum())
                value[goal, left] = found + value[goal, left ^ (1 << i)]
            value = value[NEXT_CELL].max(axis=1)
        future = value[0]
    return future[-1] / len(goals)


@pytest.mark.parametrize("episodes", [1, 2, 4])
@pytest.mark.parametrize("held_out", [1, 3, 5, 6, 10])
def test_no_walk_finds_more_among_the_goals_of_a_split(held_out, episodes):
    family = GridNav(GridNav.Config(held_out=held_out, episodes=episodes))
    for split in SPLITS:
        if len(goals := family.goals(split)) <= 11:
            oracle = reference(family, split).oracle
            assert oracle.sum() == pytest.approx(best_return(goals, episodes))
