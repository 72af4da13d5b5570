"""A worker's answer depends on the call alone."""

from dataclasses import replace

import numpy as np
import pytest

from dmrl_ray.config.schema import Adapt, Component, RolloutSettings
from dmrl_ray.envs.cartpole import CartPole
from dmrl_ray.envs.point_goal import PointGoal
from dmrl_ray.jobs.learner import Learner
from dmrl_ray.jobs.messages import AdaptCall, Call, CollectCall, EvaluateCall
from dmrl_ray.jobs.protocols import map_calls
from dmrl_ray.jobs.spec import JobSpec, Weights
from dmrl_ray.jobs.worker import LocalWorkers, RolloutWorker, collect_calls

SMALL = {"type": "actor_critic", "encoder": {"type": "mlp", "hidden_sizes": [8]}}
RECURRENT = {"type": "actor_critic", "encoder": {"type": "lstm", "hidden_size": 8}}
VARIED = {"type": "cartpole", "length": [0.3, 0.9]}


def make_spec(tasks=VARIED, algorithm=None, network=SMALL, num_envs=4, **settings):
    parts = tasks, network, algorithm or {"type": "ppo", "num_steps": 20}
    tasks, network, algorithm = (Component.model_validate(part) for part in parts)
    rollout = RolloutSettings(shards=2, num_envs=num_envs)
    return JobSpec("stage", "stage", 0, tasks, network, algorithm, rollout, **settings)


SPECS = {
    "ppo": make_spec(),
    "ppo_lstm": make_spec(network=RECURRENT),
    "rl2": make_spec({"type": "bandit"}, {"type": "rl2"}, RECURRENT),
    "maml": make_spec(
        {"type": "point_goal", "horizon": 5}, {"type": "maml", "episodes_per_task": 2}
    ),
}


def weights(spec, version):
    """A policy that differs from version to version."""
    arrays = Learner(spec).weights()
    arrays["policy_head.layer.bias"] = arrays["policy_head.layer.bias"] + 0.1 * version
    return Weights(version, arrays)


def tasks_of(family, n, split="test", **settings):
    distribution = family(family.Config.model_validate(settings))
    return distribution, tuple(distribution.sample(np.random.default_rng(0), n, split))


def arrays_of(answer):
    report, trial, state = answer
    found = [*report.episodes.values(), *state.values()]
    for rollout in trial:
        rollout.map(found.append)
    return found


def assert_same(one, other):
    assert len(one) == len(other) > 10
    for a, b in zip(one, other, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def play(spec, carrier, iterations=6):
    """Answers of both shards over some iterations; `carrier` gives the worker of each call."""
    states, answers = [{}, {}], []
    for i in range(iterations):
        for shard in range(2):
            call = CollectCall(spec, shard, i, 160 * i)
            answer = carrier(i, shard).collect(call, weights(spec, i), states[shard])
            states[shard] = answer[2]
            answers.append(arrays_of(answer))
    return answers


@pytest.mark.parametrize("name", SPECS)
def test_a_fresh_worker_with_the_state_answers_like_the_one_that_played_before(name):
    same = RolloutWorker()
    cached = play(SPECS[name], lambda i, shard: same)
    fresh = play(SPECS[name], lambda i, shard: RolloutWorker())
    for one, other in zip(cached, fresh, strict=True):
        assert_same(one, other)


def test_it_does_not_matter_which_worker_plays_which_shard():
    # Shards wander between two workers, so that each finds an outdated sampler in its cache.
    same, pair = RolloutWorker(), (RolloutWorker(), RolloutWorker())
    stay = play(SPECS["ppo"], lambda i, shard: same)
    wander = play(SPECS["ppo"], lambda i, shard: pair[(i // 2 + shard) % 2])
    for one, other in zip(stay, wander, strict=True):
        assert_same(one, other)


def test_a_call_made_again_gets_the_same_answer():
    spec, worker = SPECS["ppo"], RolloutWorker()
    state = worker.collect(CollectCall(spec, 0, 0, 0), weights(spec, 0), {})[2]
    call = CollectCall(spec, 0, 1, 80)
    answers = [worker.collect(call, weights(spec, 1), state) for _ in range(2)]
    assert_same(*map(arrays_of, answers))


def test_an_evaluation_between_two_collections_changes_nothing():
    spec = SPECS["ppo"]
    _, tasks = tasks_of(CartPole, 3)
    alone, disturbed = RolloutWorker(), RolloutWorker()

    def evaluating(i, shard):
        disturbed.evaluate(EvaluateCall(spec, tasks, 0, 0, True, i), weights(spec, i))
        return disturbed

    pairs = zip(play(spec, lambda i, s: alone, 3), play(spec, evaluating, 3), strict=True)
    for one, other in pairs:
        assert_same(one, other)


def test_many_other_jobs_in_between_change_nothing():
    # A worker keeps eight programs; the ninth job clears its caches.
    spec, busy, idle = SPECS["ppo"], RolloutWorker(), RolloutWorker()

    def crowded(i, shard):
        for n in range(9):
            other = replace(spec, name=f"job {n}")
            busy.collect(CollectCall(other, 0, 0, 0), weights(other, 0), {})
        return busy

    pairs = zip(play(spec, lambda i, s: idle, 2), play(spec, crowded, 2), strict=True)
    for one, other in pairs:
        assert_same(one, other)


def test_episodes_go_on_from_one_iteration_to_the_next():
    # 20 steps per iteration; CartPole under random actions lives about 22 on average, so that
    # some episodes are longer than any one iteration.
    worker = RolloutWorker()
    state, lengths = {}, []
    for i in range(8):
        call = CollectCall(SPECS["ppo"], 0, i, 0)
        report, _, state = worker.collect(call, weights(SPECS["ppo"], 0), state)
        lengths += report.episodes["length"].tolist()
    assert max(lengths) > 20


def test_shards_live_through_different_things():
    worker, spec = RolloutWorker(), make_spec("cartpole")  # one physics: the noise alone differs
    calls = [CollectCall(spec, shard, 0, 0) for shard in range(2)]
    (one,), (other,) = (worker.collect(call, weights(spec, 0), {})[1] for call in calls)
    assert (one.obs != other.obs).any()
    assert (one.action != other.action).any()


@pytest.mark.parametrize("greedy", [True, False])
@pytest.mark.parametrize("name", ["ppo", "rl2", "maml"])
def test_evaluation_is_deterministic(name, greedy):
    spec = SPECS[name]
    kind = spec.tasks.load()
    distribution = kind(spec.tasks.settings)
    tasks = tuple(distribution.sample(np.random.default_rng(1), 3, "test"))
    call = EvaluateCall(spec, tasks, 0, 0, greedy, 5)
    used = RolloutWorker()
    used.evaluate(replace(call, trial=1), weights(spec, 0))
    one, other = (w.evaluate(call, weights(spec, 0)) for w in (used, RolloutWorker()))
    for column in one:
        np.testing.assert_array_equal(one[column], other[column], column)


def test_an_evaluation_plays_every_episode_of_every_task_once():
    spec = make_spec({"type": "point_goal", "horizon": 4, "episodes": 3}, network=SMALL)
    _, tasks = tasks_of(PointGoal, 5, horizon=4, episodes=3)
    rows = RolloutWorker().evaluate(EvaluateCall(spec, tasks, 0, 0, True, 0), weights(spec, 0))
    played = sorted(zip(rows["task_id"], rows["episode"], strict=True))
    assert played == sorted((task.id, e) for task in tasks for e in range(3))


def test_evaluating_maml_counts_one_episode_after_every_shot_also_where_episodes_are_short():
    # CartPole's episodes are much shorter than the 500 steps that every step is given.
    spec = make_spec(VARIED, {"type": "maml", "episodes_per_task": 2, "evaluation_steps": 2})
    _, tasks = tasks_of(CartPole, 2, length=[0.3, 0.9])
    rows = RolloutWorker().evaluate(EvaluateCall(spec, tasks, 0, 0, True, 0), weights(spec, 0))
    played = sorted(zip(rows["task_id"], rows["adaptation_step"], strict=True))
    assert played == sorted((t.id, step) for t in tasks for step in range(3) for _ in range(2))


def test_scores_are_those_of_the_familys_reference():
    spec = make_spec({"type": "point_goal", "horizon": 6})
    family, tasks = tasks_of(PointGoal, 4, horizon=6)
    rows = RolloutWorker().evaluate(EvaluateCall(spec, tasks, 0, 0, True, 0), weights(spec, 0))
    for i, task in enumerate(tasks):
        low, high = family.reference(task).random[0], family.reference(task).oracle[0]
        (at,) = np.flatnonzero(rows["task_id"] == task.id)
        assert rows["score"][at] == pytest.approx((rows["return"][at] - low) / (high - low)), i


def test_training_tasks_have_no_score():
    report, _, _ = RolloutWorker().collect(
        CollectCall(SPECS["maml"], 0, 0, 0), weights(SPECS["maml"], 0), {}
    )
    assert np.isnan(report.episodes["score"]).all()
    assert set(report.episodes["split"]) == {"train"}


def test_environment_steps_of_a_row_count_from_where_its_shard_began():
    # 4 columns; point_goal's episodes of 5 steps end at steps 5 and 10 of the trial.
    report, _, _ = RolloutWorker().collect(
        CollectCall(SPECS["maml"], 0, 3, 1000), weights(SPECS["maml"], 0), {}
    )
    np.testing.assert_array_equal(report.episodes["env_steps"], [5 * 4] * 4 + [10 * 4] * 4)
    assert report.env_steps == 4 * 10


def test_a_small_job_whole_is_the_same_job_step_by_step():
    _, (task,) = tasks_of(PointGoal, 1, horizon=5)
    spec = make_spec({"type": "point_goal", "horizon": 5}, fixed_tasks=(task,), split="test")
    initial = weights(spec, 3).arrays
    report = RolloutWorker().train(spec, initial, 2)
    rows, trained = report.episodes, report.weights
    learner, worker, state = Learner(spec), RolloutWorker(), {}
    learner.load_weights(initial)
    for i in range(2):
        call = CollectCall(spec, 0, i, 0)
        _, trial, state = worker.collect(call, Weights(i, learner.weights()), state)
        learner.update(i, 0, [trial])
    for name, array in learner.weights().items():
        np.testing.assert_array_equal(trained[name], array, name)
    assert set(rows["adaptation_step"]) == {0, 1, 2}
    assert set(rows["task_id"]) == {task.id}


def test_an_episode_counts_the_updates_before_it_began():
    # CartPole falls after 8 steps at the earliest: collections of 5 cut every episode.
    spec = make_spec(
        VARIED, {"type": "ppo", "num_steps": 5}, fixed_tasks=tasks_of(CartPole, 1)[1], record=True
    )
    report = RolloutWorker().train(spec, Learner(spec).weights(), 9)
    rows, begun = report.episodes, {}
    for part in report.steps:
        starts = part["t"] == 0
        keys = zip(part["environment"][starts], part["episode"][starts], strict=True)
        begun |= dict(zip(keys, part["adaptation_step"][starts], strict=True))
    first = rows["adaptation_step"][rows["experience_episodes"] == 0]
    assert (first == 0).all()
    assert rows["policy_version"].min() > 0
    assert set(rows["adaptation_step"]) <= set(begun.values())
    assert (rows["adaptation_step"] < rows["policy_version"]).all()


def test_schedules_of_a_small_job_run_over_its_updates():
    algorithm = {"type": "ppo", "num_steps": 20}
    plain, annealed = (
        make_spec(VARIED, algorithm | {"anneal_lr": on}, fixed_tasks=tasks_of(CartPole, 1)[1])
        for on in (False, True)
    )
    start = Learner(plain).weights()

    def trained(spec, updates):
        return RolloutWorker().train(replace(spec, updates=updates), start, updates).weights

    def moved(one, other):
        return any(not np.array_equal(one[n], other[n]) for n in one if n.startswith("encoder"))

    assert not moved(trained(plain, 1), trained(annealed, 1))  # The first has all of it.
    assert moved(trained(plain, 2), trained(annealed, 2))


def test_a_small_job_is_the_same_on_a_worker_that_did_it_before():
    _, (task,) = tasks_of(PointGoal, 1, horizon=5)
    spec = make_spec({"type": "point_goal", "horizon": 5}, fixed_tasks=(task,), split="test")
    worker = RolloutWorker()
    one, again = (worker.train(spec, weights(spec, 0).arrays, 2) for _ in range(2))
    for name in one.episodes:
        np.testing.assert_array_equal(one.episodes[name], again.episodes[name], name)
    for name in one.weights:
        np.testing.assert_array_equal(one.weights[name], again.weights[name], name)


def test_rows_of_a_stream_count_episodes_since_the_change():
    family, tasks = tasks_of(PointGoal, 4, horizon=5)
    spec = make_spec({"type": "point_goal", "horizon": 5}, {"type": "rl2"})
    settings = Adapt(init_from="x", episodes_per_task=3)
    call = AdaptCall(spec, (tasks[:2], tasks[2:]), settings, 0)
    rows, since = RolloutWorker().adapt(call, weights(spec, 0))
    first = rows["trial"] == 0
    np.testing.assert_array_equal(rows["episode"][first], [0, 1, 2, 0, 1, 2])
    np.testing.assert_array_equal(rows["change"][first], [0, 0, 0, 1, 1, 1])
    assert rows["task_id"][first].tolist() == [tasks[0].id] * 3 + [tasks[1].id] * 3
    # The reward of each step, summed over episodes, is the returns of the rows.
    rewards = np.stack([reward for reward, _ in since])
    assert rewards.shape == (2, 15, 2)
    total = [rows["return"][(rows["trial"] == n)].sum() for n in range(2)]
    np.testing.assert_allclose(rewards.sum((0, 1)), total, rtol=1e-5)
    # An episode's regret is what its return lacks of the oracle's.
    lacks = 3 * family.reference(tasks[1]).oracle[0] - rewards[1, :, 0].sum()
    assert since[1][1][:, 0].sum() == pytest.approx(lacks)


def evaluations(num):
    spec = SPECS["ppo"]
    _, tasks = tasks_of(CartPole, num)
    calls = [EvaluateCall(spec, (task,), 0, 0, True, 0) for task in tasks]
    calls = [Call(RolloutWorker.evaluate, (call, weights(spec, 0))) for call in calls]
    return calls, [task.id for task in tasks]


def test_local_workers_answer_every_call_with_its_number():
    calls, ids = evaluations(2)
    results = dict(map_calls(LocalWorkers(), calls))
    assert [results[i]["task_id"][0] for i in range(2)] == ids


def test_a_pool_without_ray_stops_between_two_calls_when_asked():
    asked = []

    def check():
        asked.append(True)
        if len(asked) == 2:
            raise KeyboardInterrupt

    calls, _ = evaluations(3)
    answers = map_calls(LocalWorkers(), calls, check)
    assert next(answers)[0] == 0
    with pytest.raises(KeyboardInterrupt):
        next(answers)


def test_a_collection_in_flight_begins_with_the_state_that_the_one_before_leaves():
    spec, workers = SPECS["ppo"], LocalWorkers()
    acting, before = weights(spec, 0), [{}]
    for iteration in range(3):
        (call,) = collect_calls([CollectCall(spec, 0, iteration, 0)], acting, before)
        before = [workers.submit(call)]
    (last,), _ = workers.ready(before, 0.0)  # The others are made first.
    worker, state = RolloutWorker(), {}
    for iteration in range(3):
        report, trial, state = worker.collect(CollectCall(spec, 0, iteration, 0), acting, state)
    np.testing.assert_array_equal(last.value.episodes["return"], report.episodes["return"])
    np.testing.assert_array_equal(last.trial[0].obs, trial[0].obs)
    assert last.state.keys() == state.keys()


def test_workers_say_what_they_do_and_since_when():
    workers, seen = LocalWorkers(), []

    def watched(worker, number):
        seen.append(workers.states()[0])
        return number

    before = workers.states()[0]
    call = Call(watched, (7,))
    assert list(map_calls(workers, [call])) == [(0, 7)]
    after = workers.states()[0]
    assert (before.call, seen[0].call, after.call) == (None, call, None)
    assert before.since <= seen[0].since <= after.since
