"""Workers and learners on Ray do what the local ones do, whatever dies meanwhile."""

import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dmrl_ray.config.loading import parse_config
from dmrl_ray.config.schema import Component, LearnerSettings, RolloutSettings, WorkerSettings
from dmrl_ray.control.run_state import Run
from dmrl_ray.envs.point_goal import PointGoal, PointGoalVectorEnv
from dmrl_ray.errors import ClusterError, Interrupted, JobLost
from dmrl_ray.jobs.learner import LocalLearners
from dmrl_ray.jobs.messages import Call, CollectCall, EvaluateCall
from dmrl_ray.jobs.protocols import answers, map_calls
from dmrl_ray.jobs.spec import JobSpec, Weights
from dmrl_ray.jobs.worker import LocalWorkers, RolloutWorker, collect_calls
from dmrl_ray.results.display import Display
from dmrl_ray.store.writer import RunWriter
from dmrl_ray.types import EnvironmentFault, storable

ray = pytest.importorskip("ray")
ROOT = Path(__file__).resolve().parents[2]
ONE_THREAD = LearnerSettings(threads=1, device="cpu")


class BrokenEnv(PointGoalVectorEnv):
    def observe(self):
        return np.full_like(self.position, np.nan)


class Broken(PointGoal):
    def make_vec(self, num_envs):
        return BrokenEnv(num_envs, self.config.horizon)


class LeavingEnv(PointGoalVectorEnv):
    def step(self, actions):
        if len(self.ways) == 1:
            os._exit(0)
        raise self.ways.pop()


class Leaving(PointGoal):
    class Config(PointGoal.Config):
        ways: int = 0

    def make_vec(self, num_envs):
        env = LeavingEnv(num_envs, self.config.horizon)
        env.ways = [None, SystemExit(3), KeyboardInterrupt()][: self.config.ways]
        return env


def make_spec(name, algorithm="ppo", tasks="point_goal", *, shards=2, num_envs=40, **settings):
    return JobSpec(
        stage="meta",
        name=name,
        seed=0,
        tasks=Component(type=tasks),
        network=Component(type="actor_critic"),
        algorithm=Component(type=algorithm, **settings),
        rollout=RolloutSettings(shards=shards, num_envs=num_envs),
        env_steps=100_000,
    )


def start(workers, spec, iteration, weights, states):
    """Begin an iteration; `states` may be what the beginning of the one before returned."""
    calls = [CollectCall(spec, shard, iteration, 0) for shard in range(spec.rollout.shards)]
    return [workers.submit(call) for call in collect_calls(calls, weights, states)]


def finish(workers, started, check=lambda: None):
    """Reports, trials and states by shard."""
    on_event = getattr(workers, "events", []).append
    found = {answer.id: answer for answer in answers(workers, started, check, on_event)}
    return [(found[i].value, found[i].trial, found[i].state) for i in started]


def collect(workers, spec, iteration, weights, states):
    return finish(workers, start(workers, spec, iteration, weights, states))


def undisturbed(spec, iterations):
    """Trials and states of the last iteration, from one process that nothing happens to."""
    workers, weights = LocalWorkers(), first_weights(spec)
    states = [{}] * spec.rollout.shards
    for iteration in range(iterations):
        collected = collect(workers, spec, iteration, weights, states)
        states = [state for _, _, state in collected]
    return [trial for _, trial, _ in collected], states


def first_weights(spec):
    return LocalLearners(spec).published()


def assert_same(answer, expected):
    """Two nests of lists, dicts, dataclasses and arrays are equal to the last bit."""
    if isinstance(expected, np.ndarray):
        np.testing.assert_array_equal(answer, expected)
    elif isinstance(expected, dict):
        assert answer.keys() == expected.keys()
        for key, value in expected.items():
            assert_same(answer[key], value)
    elif isinstance(expected, (list, tuple)):
        assert len(answer) == len(expected)
        for one, other in zip(answer, expected, strict=True):
            assert_same(one, other)
    elif hasattr(expected, "__dict__"):
        assert_same(vars(answer), vars(expected))
    else:
        assert answer == expected


@pytest.fixture(scope="module")
def pool(ray_instance):
    from dmrl_ray.cluster.pool import RayWorkers

    workers = RayWorkers(WorkerSettings(num=2, max_failures=100))
    yield workers
    workers.close()


@pytest.fixture
def workers(pool):
    """Two workers, both up; the events since the test began are `workers.events`."""
    spec = make_spec("until both are up")
    end = time.monotonic() + 30
    while pool.alive < 2 and time.monotonic() < end:
        collect(pool, spec, 0, first_weights(spec), [{}, {}])
    pool.events = []
    return pool


def test_a_killed_workers_shard_is_played_again_and_ends_the_same(workers):
    spec = make_spec("killed")
    weights = workers.put(first_weights(spec))
    states = [s for _, _, s in collect(workers, spec, 0, weights, [{}, {}])]
    pid = workers.pids()[0]
    os.kill(pid, signal.SIGSTOP)  # So that it dies with its call in flight.
    started = start(workers, spec, 1, weights, states)
    os.kill(pid, signal.SIGKILL)
    answers = finish(workers, started)
    trials, states = undisturbed(spec, 2)
    assert_same([workers.fetch(trial) for _, trial, _ in answers], trials)
    stored = [storable(workers.fetch(state)) for _, _, state in answers]
    assert_same(stored, [storable(state) for state in states])
    lost = workers.events[0]
    assert lost.event == "worker_lost"
    assert [lost.detail[key] for key in ("worker", "pid", "shards")] == [0, pid, [0]]


def test_a_killed_worker_changes_nothing_where_iterations_are_in_flight_together(workers):
    # Three shards, so that calls wait for those before them on either side of the pool.
    spec = make_spec("in flight together", tasks="cartpole", shards=3, num_steps=16)
    weights = workers.put(first_weights(spec))
    states = [s for _, _, s in collect(workers, spec, 0, weights, [{}] * 3)]
    pid = workers.pids()[0]
    os.kill(pid, signal.SIGSTOP)  # So that it dies with its calls in flight.
    first = start(workers, spec, 1, weights, states)
    second = start(workers, spec, 2, weights, first)
    third = start(workers, spec, 3, weights, second)
    os.kill(pid, signal.SIGKILL)
    for started in (first, second, third):
        answers = finish(workers, started)
    assert workers.events[0].detail["shards"] == [0, 2]
    trials, states = undisturbed(spec, 4)
    assert_same([workers.fetch(trial) for _, trial, _ in answers], trials)
    stored = [storable(workers.fetch(state)) for _, _, state in answers]
    assert_same(stored, [storable(state) for state in states])


def test_a_stopped_worker_is_found_within_ten_seconds(workers):
    spec = make_spec("hung")
    pid, began = workers.pids()[1], time.monotonic()
    os.kill(pid, signal.SIGSTOP)
    answers = collect(workers, spec, 0, workers.put(first_weights(spec)), [{}, {}])
    assert_same([workers.fetch(trial) for _, trial, _ in answers], undisturbed(spec, 1)[0])
    assert time.monotonic() - began < 10
    assert [event.event for event in workers.events] == ["worker_lost"]
    assert re.match(r"stopped for \d\.\d s", workers.events[0].detail["reason"])


def test_the_late_answer_of_a_replaced_worker_is_dropped(workers, monkeypatch):
    spec = make_spec("late")
    weights = workers.put(first_weights(spec))
    pid, kill, spared = workers.pids()[0], ray.kill, []

    def spare(actor, no_restart):
        spared.append(actor)
        os.kill(pid, signal.SIGCONT)

    os.kill(pid, signal.SIGSTOP)
    started = start(workers, spec, 0, weights, [{}, {}])
    request = workers._requests[started[0]]
    first_submission = request.refs[0]
    monkeypatch.setattr(ray, "kill", spare)
    states = [state for _, _, state in finish(workers, started)]
    monkeypatch.undo()
    assert ray.get(first_submission, timeout=30).env_steps == 40 * 128
    assert request.refs[0] != first_submission
    answers = collect(workers, spec, 1, weights, states)
    kill(spared[0])
    assert_same([workers.fetch(trial) for _, trial, _ in answers], undisturbed(spec, 2)[0])


def test_map_answers_every_call_once_though_a_worker_dies(workers):
    spec = make_spec("map")
    weights = first_weights(spec)
    tasks = tuple(PointGoal(PointGoal.Config()).sample(np.random.default_rng(0), 40, "test"))
    calls = [EvaluateCall(spec, tasks, 0, chunk, True, 0) for chunk in range(6)]

    def evaluations(acting):
        return [Call(RolloutWorker.evaluate, (call, acting)) for call in calls]

    expected = dict(map_calls(LocalWorkers(), evaluations(weights)))
    on_ray = workers.put(weights)
    pid = workers.pids()[0]
    os.kill(pid, signal.SIGSTOP)
    results = map_calls(workers, evaluations(on_ray))
    answered = [next(results)]
    os.kill(pid, signal.SIGKILL)
    answered += list(results)
    assert sorted(i for i, _ in answered) == list(range(6))
    assert_same(dict(answered), expected)


def test_a_fault_of_an_environment_reaches_the_driver_and_is_not_retried(workers):
    spec = make_spec("broken", tasks="test_cluster:Broken")
    with pytest.raises(EnvironmentFault, match="obs of environment 0 at step 0"):
        collect(workers, spec, 0, workers.put(first_weights(spec)), [{}, {}])
    assert workers.events == []


@pytest.mark.parametrize(
    ("ways", "found"), [(1, r"SystemExit: os._exit\(0\)"), (2, "SystemExit: 3"), (3, "KeyboardInt")]
)
def test_an_environment_that_ends_its_worker_is_named_and_no_worker_is_lost(workers, ways, found):
    spec = replace(
        make_spec(f"leaves {ways}"), tasks=Component(type="test_cluster:Leaving", ways=ways)
    )
    with pytest.raises(EnvironmentFault, match=f"step raised {found}"):
        collect(workers, spec, 0, workers.put(first_weights(make_spec("leaves"))), [{}, {}])
    assert workers.events == []


def test_a_wait_ends_when_the_check_raises(workers):
    spec, weights = make_spec("interrupted"), workers.put(first_weights(make_spec("interrupted")))

    def interrupt():
        raise Interrupted(signal.SIGINT)

    started = start(workers, spec, 0, weights, [{}, {}])
    with pytest.raises(Interrupted):
        finish(workers, started, interrupt)
    answers = collect(workers, spec, 0, weights, [{}, {}])  # Others are answered.
    assert_same([workers.fetch(trial) for _, trial, _ in answers], undisturbed(spec, 1)[0])


def test_the_state_of_a_hung_worker_says_what_it_hangs_in(workers):
    spec = make_spec("state")
    while any(state.call for state in workers.states()):  # of tests before
        workers.ready([], 0.1)
    os.kill(workers.pids()[0], signal.SIGSTOP)
    began = time.monotonic()
    started = start(workers, spec, 0, workers.put(first_weights(spec)), [{}, {}])
    hung = workers.states()[0]
    assert (hung.call.name, hung.call.shard) == ("collect", 0)
    assert began <= hung.since <= time.monotonic()
    os.kill(hung.pid, signal.SIGCONT)
    finish(workers, started)
    assert [state.call for state in workers.states()] == [None, None]


def test_more_shards_than_workers_end_the_same(workers):
    spec = make_spec("five shards", shards=5)
    answers = collect(workers, spec, 0, workers.put(first_weights(spec)), [{}] * 5)
    assert_same([workers.fetch(trial) for _, trial, _ in answers], undisturbed(spec, 1)[0])


def test_too_many_lost_workers_end_the_run(ray_instance):
    from dmrl_ray.cluster.pool import RayWorkers

    spec = make_spec("too many")
    workers = RayWorkers(WorkerSettings(num=1, max_failures=0))
    workers.start()
    os.kill(workers.pids()[0], signal.SIGKILL)
    with pytest.raises(ClusterError, match=r"workers\.max_failures: 1 workers were lost"):
        collect(workers, spec, 0, first_weights(spec), [{}, {}])
    workers.close()


def test_learners_that_find_no_room_say_what_is_missing(ray_instance, monkeypatch):
    from dmrl_ray.cluster import learners as ray_learners

    monkeypatch.setattr(ray_learners, "START_TIMEOUT_S", 0.5)
    with pytest.raises(ClusterError, match=r"needs 999 CPUs, cluster has \d+ \("):
        ray_learners.RayLearners(make_spec("x"), LearnerSettings(threads=999))


def test_what_ends_the_wait_for_workers_ends_the_learners_that_start_meanwhile(ray_instance):
    from dmrl_ray.cluster.learners import RayLearners

    def stopped():
        raise Interrupted(signal.SIGINT)

    nowhere = LearnerSettings(threads=999)
    with pytest.raises(Interrupted):
        RayLearners(make_spec("x"), nowhere, meanwhile=stopped)


def test_a_cluster_too_small_for_both_is_told_at_once(ray_instance, tmp_path, monkeypatch):
    from dmrl_ray.cluster import connection

    monkeypatch.setattr(connection, "GROWTH_S", 0.5)
    meta = "stages: {meta: {type: pretrain, env_steps: 1}}"
    text = f"{{tasks: bandit, workers: {{num: 9}}, learners: {{threads: 99}}, {meta}}}"
    with RunWriter.create(tmp_path / "run", text, {}) as writer:
        run = Run(parse_config(text, "run.yaml"), writer, Display(quiet=True), None)
        with pytest.raises(ClusterError, match=r"workers\.num: 9 .* need 108 CPUs, and .* has \d"):
            run.learners(make_spec("x"))
        run.close()


@pytest.mark.parametrize("algorithm", ["ppo", "maml"])
def test_two_learners_train_like_one(ray_instance, algorithm):
    from dmrl_ray.cluster.learners import RayLearners

    spec = make_spec("two learners", algorithm, optimizer="sgd", lr=0.1)
    one = LocalLearners(spec)
    two = RayLearners(spec, LearnerSettings(num=2, threads=1))
    before = one.weights()
    for iteration in range(3):
        answers = collect(LocalWorkers(), spec, iteration, one.published(), [{}, {}])
        trials = [trial for _, trial, _ in answers]
        one.update(0, trials)
        two.update(0, [ray.put(trial) for trial in trials])
    expected, weights = one.weights(), two.weights()
    assert two.version == 3
    for name, array in expected.items():
        np.testing.assert_allclose(weights[name], array, rtol=1e-4, atol=1e-6, err_msg=name)
    assert any(np.abs(expected[name] - before[name]).max() > 1e-3 for name in expected)
    two.close()


def test_a_dead_learner_loses_the_job(ray_instance):
    from dmrl_ray.cluster.learners import RayLearners

    spec = make_spec("dead learner")
    learners = RayLearners(spec, LearnerSettings(num=2, threads=1))
    trials = [
        trial for _, trial, _ in collect(LocalWorkers(), spec, 0, first_weights(spec), [{}, {}])
    ]
    os.kill(learners.pids()[1], signal.SIGKILL)
    with pytest.raises(JobLost):
        learners.update(0, trials)
    learners.close()


def test_a_stopped_learner_loses_the_job(ray_instance):
    from dmrl_ray.cluster.learners import RayLearners

    learners = RayLearners(make_spec("hung learner"), ONE_THREAD)
    os.kill(learners.pids()[0], signal.SIGSTOP)
    with pytest.raises(JobLost, match=r"process \d+ on .* was lost: stopped for"):
        learners.get_state()
    learners.close()


def train(workers, learners, spec):
    states = [{}] * spec.rollout.shards
    for iteration in range(3):
        answers = collect(workers, spec, iteration, learners.published(), states)
        states = [state for _, _, state in answers]
        metrics = learners.update(1000 * iteration, [trial for _, trial, _ in answers])
    return metrics, learners.get_state(), [workers.fetch(state) for state in states]


@pytest.mark.parametrize("algorithm", ["ppo", pytest.param("rl2", marks=pytest.mark.slow)])
def test_ray_trains_to_the_same_bits_as_one_process(workers, algorithm):
    from dmrl_ray.cluster.learners import RayLearners

    spec = make_spec(f"same {algorithm}", algorithm, "cartpole" if algorithm == "ppo" else "bandit")
    on_ray = RayLearners(spec, ONE_THREAD)
    metrics, *state = train(workers, on_ray, spec)
    expected, *expected_state = train(LocalWorkers(), LocalLearners(spec), spec)
    assert_same(state, expected_state)
    assert {k: v for k, v in metrics.items() if "time" not in k} == {
        k: v for k, v in expected.items() if "time" not in k
    }
    assert on_ray.published() is on_ray.published()
    assert isinstance(workers.fetch(on_ray.published()), Weights)
    on_ray.close()


def test_learners_go_on_from_a_checkpoint(ray_instance):
    from dmrl_ray.cluster.learners import RayLearners

    spec = make_spec("checkpoint")
    one, other = LocalLearners(spec), RayLearners(spec, ONE_THREAD)
    trials = [t for _, t, _ in collect(LocalWorkers(), spec, 0, one.published(), [{}, {}])]
    one.update(0, trials)
    other.set_state(one.get_state(), one.version)
    one.update(0, trials)
    other.update(0, trials)
    assert other.version == 2
    assert_same(other.get_state(), one.get_state())
    other.close()


def test_no_process_imports_more_of_ray_than_its_core(workers):
    heavy = {"ray.rllib", "ray.train", "ray.tune", "ray.data"}
    (worker, _) = workers.up()
    loaded = ray.get(worker.actor.__ray_call__.remote(lambda self: set(sys.modules)))
    assert not heavy & loaded
    code = "import sys, dmrl_ray.cluster.pool, dmrl_ray.cluster.learners; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)
    assert not heavy & set(run.stdout.decode().split())


def test_workers_have_one_thread(workers):
    (worker, _) = workers.up()
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    read = worker.actor.__ray_call__.remote(lambda self: [os.environ[name] for name in names])
    assert ray.get(read) == ["1", "1", "1"]


def test_a_cluster_that_is_not_there_is_one_sentence():
    code = """
from dmrl_ray.config.schema import RunConfig
from dmrl_ray.cluster.connection import connect
stage = {"type": "pretrain", "env_steps": 1}
config = RunConfig.model_validate({"tasks": "bandit", "stages": {"meta": stage}})
try:
    connect("127.0.0.1:1", config)
except Exception as error:
    print(type(error).__name__, error)
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.startswith("ClusterError no connection to the Ray cluster at '127.0.0.1:1'")
    assert run.stdout.count("\n") == 1


def cluster_yaml():
    yaml = pytest.importorskip("yaml")
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


def test_rays_own_validator_accepts_the_cluster_file():
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(cluster_yaml())
    validate_config(config)
    assert config["available_node_types"]["rollout-spot"]["max_workers"] == 32


def test_the_cluster_file_installs_what_the_project_needs():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {d for d in project["dependencies"] if not d.startswith("ray[")}  # in the image
    installed = set(re.findall(r'"([^"]+)"', cluster_yaml()["setup_commands"][0]))
    assert installed == needed
