"""RLlib's algorithms as baselines: the same tasks, stages, tables and commits as ours."""

import logging
import signal

import numpy as np
import pytest

import dmrl_ray
from dmrl_ray.config.loading import parse_config
from dmrl_ray.control import controller
from dmrl_ray.errors import ConfigError, Interrupted
from dmrl_ray.jobs.external import external_of
from dmrl_ray.jobs.spec import job_spec, load_family
from dmrl_ray.results.display import Display
from dmrl_ray.results.report import text_report
from dmrl_ray.rllib.baseline import Baseline
from dmrl_ray.store.commit_records import verify
from dmrl_ray.types import EnvironmentFault

pytestmark = pytest.mark.usefixtures("ray_instance")

PPO = (
    "{type: 'rllib:PPO', num_envs_per_env_runner: 10, train_batch_size_per_learner: 100, "
    "minibatch_size: 50, num_epochs: 2, lr: 1e-2, model: {fcnet_hiddens: [8]}}"
)
RL2 = (
    "{type: 'rllib:PPO', num_envs_per_env_runner: 4, train_batch_size_per_learner: 80, "
    "minibatch_size: 80, num_epochs: 1, whole_trials: true, previous: true, "
    "model: {fcnet_hiddens: [8], use_lstm: true, lstm_cell_size: 8, max_seq_len: 10}}"
)
REPLAY = "num_steps_sampled_before_learning_starts: 8, train_batch_size_per_learner: 8"
ALGORITHMS = {
    "PPO": ("point_goal", "minibatch_size: 16, train_batch_size_per_learner: 16, num_epochs: 1"),
    "APPO": ("bandit", "train_batch_size_per_learner: 40"),
    "IMPALA": ("bandit", "train_batch_size_per_learner: 40"),
    "SAC": ("point_goal", f"{REPLAY}, min_sample_timesteps_per_iteration: 12"),
    "DQN": ("bandit", f"{REPLAY}, min_sample_timesteps_per_iteration: 12"),
}
CONFIG = """
tasks: {tasks}
algorithm: {algorithm}
workers: {{num: 0}}
commit: {{every_updates: 1}}
stages:
  multi: {{type: pretrain, env_steps: 400, validate_every: 2, validation_tasks: 3}}
{more}
"""
MORE = """
  tuned: {type: finetune, init_from: multi, tasks: 2, updates: 2}
  held_out: {type: evaluate, init_from: multi, tasks: 6}
"""
GOALS = "{type: point_goal, horizon: 5}"


def config(algorithm=PPO, more="", tasks=GOALS):
    text = CONFIG.format(tasks=tasks, algorithm=algorithm, more=more)
    return parse_config(text, "test.yaml")


def baseline(algorithm=PPO, tasks=GOALS):
    made = external_of(job_spec(config(algorithm, tasks=tasks), "multi"))
    assert isinstance(made, Baseline)
    return made


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of three stages, and what it logged or warned of."""
    folder = tmp_path_factory.mktemp("rllib") / "run"
    heard = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: heard.append(record.getMessage())
    logging.getLogger().addHandler(handler)
    logging.getLogger("ray").addHandler(handler)
    controller.run(config(more=MORE), folder, display=Display(quiet=True))
    for name in (None, "ray"):
        logging.getLogger(name).removeHandler(handler)
    return folder, heard


def test_every_step_of_training_is_in_the_episodes_of_its_tasks(finished):
    episodes = dmrl_ray.load(finished[0])
    training = episodes[(episodes["stage"] == "multi") & (episodes["split"] == "train")]
    assert (training["length"] == 5).all()
    assert len(training) == 400 // 5
    assert training["task_id"].is_unique
    assert training["env_steps"].is_monotonic_increasing
    assert training["env_steps"].max() == 400
    assert sorted(training["policy_version"].unique()) == [0, 1, 2, 3]
    assert set(training["algorithm"]) == {"rllib:ppo"}


def test_fine_tuning_is_reported_before_every_update_and_after_the_last(finished):
    episodes = dmrl_ray.load(finished[0])
    tuned = episodes[episodes["stage"] == "tuned"]
    assert tuned.groupby(["job", "adaptation_step"]).size().tolist() == [20] * 6
    assert (tuned.groupby("job")["task_id"].nunique() == 1).all()
    assert set(tuned["split"]) == {"test"}
    assert tuned["score"].notna().all()


def test_held_out_tasks_are_played_once_each_and_scored(finished):
    episodes = dmrl_ray.load(finished[0])
    held_out = episodes[episodes["stage"] == "held_out"]
    assert held_out["task_id"].nunique() == len(held_out) == 6
    tasks = dmrl_ray.load(finished[0], table="tasks")
    assert set(held_out["task_id"]) <= set(tasks.loc[tasks["split"] == "test", "task_id"])


def test_the_report_scores_it_against_random_and_oracle(finished):
    report = text_report(finished[0])
    for line in ("| tuned ", "| held_out ", "| multi ", "0 is the random policy, 1 the oracle"):
        assert line in report
    assert report.count("rllib:ppo") == 2


def test_metrics_have_the_common_names_if_there_is_one(finished):
    metrics = dmrl_ray.load(finished[0], table="metrics")
    names = set(metrics["name"])
    assert {"policy_loss", "value_loss", "entropy", "approx_kl", "return"} <= names
    assert {"rllib/vf_explained_var", "validation_score", "steps_per_s"} <= names
    assert np.isfinite(metrics["value"]).all()


def test_checkpoints_are_part_of_the_commits_and_policies_are_no_pickles(finished):
    assert verify(finished[0]) == []
    files = sorted(path.name for path in (finished[0] / "checkpoints").iterdir())
    assert any(name.startswith("multi.best") for name in files)
    assert all(name.endswith(".safetensors") for name in files)
    damaged = finished[0] / "checkpoints" / files[0]
    data = damaged.read_bytes()
    damaged.write_bytes(data[:-1] + b"?")
    assert verify(finished[0])
    damaged.write_bytes(data)


def test_nothing_is_logged_that_nobody_asked_for(finished):
    assert finished[1] == []


def test_more_held_out_tasks_can_be_asked_for_later(finished):
    rows = controller.evaluate(
        finished[0], stage="multi", split="test", tasks=9, trials=1, checkpoint="last"
    )
    assert len(rows) == 9
    assert set(rows["algorithm"]) == {"rllib:ppo"}


def test_a_stopped_run_continues_from_its_newest_iteration(tmp_path, monkeypatch):
    iterate, calls = Baseline.iterate, []

    def stopping(self, *args, **kwargs):
        calls.append(self.version)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGTERM)
        return iterate(self, *args, **kwargs)

    monkeypatch.setattr(Baseline, "iterate", stopping)
    with pytest.raises(Interrupted):
        controller.run(config(), tmp_path / "run", display=Display(quiet=True))
    with pytest.raises(ConfigError, match=r"'multi': the state .* pickles, .* with --trust"):
        controller.resume(tmp_path / "run", display=Display(quiet=True))
    controller.resume(tmp_path / "run", trust=True, display=Display(quiet=True))
    assert calls == [0, 1, 2, 3]
    metrics = dmrl_ray.load(tmp_path / "run", table="metrics")
    assert metrics.loc[metrics["name"] == "return", "policy_version"].tolist() == [1, 2, 3, 4]
    events = dmrl_ray.load(tmp_path / "run", table="events")["event"].tolist()
    assert events.count("job_started") == events.count("job_resumed") == 1
    assert verify(tmp_path / "run") == []


def test_a_checkpoint_has_weights_optimiser_and_counters():
    first = baseline()
    first.iterate(0)
    first.iterate(100)
    state, weights = first.get_state(), first.weights()
    again = baseline()
    again.set_state(state, 2)
    assert again._algorithm.iteration == 2
    assert weights.keys() == again.weights().keys()
    for name, array in again.weights().items():
        assert np.array_equal(array, weights[name])
    a, b = (
        x._algorithm.learner_group.get_state(components="learner/optimizer") for x in (first, again)
    )
    assert str(a) == str(b)
    first.close()
    again.close()


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "a/../../evil", "", "a//b", "a\n"])
def test_a_name_of_an_array_leads_nowhere(name):
    made = baseline()
    with pytest.raises(ValueError, match="cannot name a file of a checkpoint"):
        made.set_state({name: np.zeros(1, np.uint8)}, 1)


@pytest.mark.parametrize(
    ("algorithm", "tasks"),
    [(PPO, GOALS), (RL2, "{type: point_goal, horizon: 5, episodes: 2}")],
    ids=["ppo", "rl2"],
)
def test_our_player_acts_as_rllibs_own_runner_does(algorithm, tasks):
    from dmrl_ray.jobs.messages import EvaluateCall

    made = baseline(algorithm, tasks)
    task = load_family(made.spec.tasks).sample(np.random.default_rng(0), 1, "test")[0]
    made.iterate(0)
    rows = made.play(EvaluateCall(made.spec, (task,), 0, 0, True, 0), made.weights())
    runner = made._algorithm.env_runner
    runner.env.unwrapped._envs.fixed_task = task
    episode = runner.sample(num_episodes=1, explore=False, force_reset=True)[0]
    rewards = np.asarray(episode.get_rewards()).reshape(len(rows["return"]), 5)
    assert rows["return"] == pytest.approx(rewards.sum(1), rel=1e-4)
    assert rows["adaptation_step"].tolist() == list(range(len(rewards)))
    made.close()


def test_weights_that_are_loaded_act():
    first, second = baseline(), baseline()
    first.iterate(0)
    weights = first.weights()
    second.load_weights(weights)
    runner = second._algorithm.env_runner.module.get_state()
    for name, array in runner.items():
        assert np.array_equal(array, weights[name])
    first.close()
    second.close()


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_learns_from_its_samples_and_can_be_evaluated(name):
    from dmrl_ray.jobs.messages import EvaluateCall

    family, settings = ALGORITHMS[name]
    tasks = {"point_goal": "{type: point_goal, horizon: 4}", "bandit": "{type: bandit, pulls: 4}"}
    text = f"{{type: 'rllib:{name}', num_envs_per_env_runner: 4, {settings}, "
    made = baseline(text + "model: {fcnet_hiddens: [8], fusionnet_hiddens: [8]}}", tasks[family])
    made.check(None)
    before = made.weights()
    reports = [made.iterate(0)[0] for _ in range(3)]
    after = made.weights()
    assert any(not np.array_equal(before[key], after[key]) for key in before)
    lengths = np.concatenate([report.episodes["length"] for report in reports])
    assert set(lengths) == {4}
    assert 0 < lengths.sum() <= sum(report.env_steps for report in reports)
    drawn = load_family(made.spec.tasks).sample(np.random.default_rng(0), 5, "test")
    for greedy in (True, False):
        rows = made.play(EvaluateCall(made.spec, tuple(drawn), 0, 0, greedy, 0), after)
        assert rows["task_id"].tolist() == [task.id for task in drawn]
    made.close()


def test_a_fault_of_the_family_is_reported_as_such(monkeypatch):
    from dmrl_ray.envs.point_goal import PointGoalVectorEnv

    made = baseline()
    made.iterate(0)
    monkeypatch.setattr(PointGoalVectorEnv, "step", lambda self, action: 1 / 0)
    with pytest.raises(EnvironmentFault, match="raised ZeroDivisionError"):
        made.iterate(100)
    made.close()


REFUSED = {
    "a stream": (
        "  s: {type: adapt, init_from: multi}",
        "stages.s: type: rllib:ppo cannot adapt without resets; use evaluate",
    ),
    "a network": (
        "  s: {type: finetune, init_from: multi, network: actor_critic}",
        "stages.s: network: rllib:ppo has a network and a loop of its own",
    ),
    "recording": (
        "  s: {type: evaluate, init_from: multi, record: true}",
        "stages.s: record: rllib:ppo has",
    ),
    "ours after its": (
        "  s: {type: finetune, init_from: multi, algorithm: ppo}",
        "stages.s: init_from: the policy of stage 'multi' is rllib:ppo's, whose network ppo does "
        "not know; use algorithm: {type: rllib:PPO} here",
    ),
    "another of its": (
        "  s: {type: finetune, init_from: multi, algorithm: 'rllib:SAC'}",
        "is rllib:ppo's, whose network rllib:sac does not know",
    ),
    "its after ours": (
        "  m: {type: pretrain, env_steps: 1, algorithm: ppo}\n  s: {type: finetune, init_from: m}",
        "the policy of stage 'm' is ppo's, whose network rllib:ppo does not know",
    ),
    "another network": (
        "  s: {type: finetune, init_from: multi, algorithm: 'rllib:PPO'}",
        "stages.s: init_from: the network of stage 'multi' differs; use the same model",
    ),
    "a discrete algorithm on continuous actions": (
        "  s: {type: pretrain, env_steps: 1, algorithm: 'rllib:DQN'}",
        "stages.s: algorithm: RLlib cannot build a network of rllib:DQN for observations Box",
    ),
    "settings that RLlib rejects": (
        "  s: {type: pretrain, env_steps: 1, algorithm: {type: 'rllib:PPO', minibatch_size: 5000}}",
        "stages.s: algorithm: RLlib rejects the settings of rllib:PPO (ValueError: ",
    ),
}


@pytest.mark.parametrize(("more", "message"), REFUSED.values(), ids=list(REFUSED))
def test_invalid_settings_are_reported_before_anything_starts(more, message):
    with pytest.raises(ConfigError) as raised:
        controller.check(config(more=more))
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
