"""Learning from what was recorded: every algorithm on the steps of one run."""

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

from dmrl_ray.config.loading import parse_config
from dmrl_ray.config.schema import Component, Settings
from dmrl_ray.control import controller
from dmrl_ray.errors import ConfigError
from dmrl_ray.jobs.learner import Learner
from dmrl_ray.jobs.spec import Weights, build, job_spec, set_weights
from dmrl_ray.jobs.worker import CollectCall, RolloutWorker
from dmrl_ray.learn.minibatches import previous_in
from dmrl_ray.networks.base import Encoder
from dmrl_ray.results.display import Display
from dmrl_ray.results.reading import load
from dmrl_ray.store.writer import RunWriter
from dmrl_ray.types import random_stream

HEAD = """
name: offline
tasks: {type: grid_nav, episodes: 2}
network: {encoder: {type: gru, hidden_size: 8}}
rollout: {shards: 2, num_envs: 4}
workers: {num: 0}
learners: {threads: 1}
algorithm: {type: rl2}
stages:
  taught: {type: pretrain, env_steps: 240, validation_tasks: 2}
  histories: {type: finetune, init_from: taught, split: train, tasks: 3, updates: 4, record: true}
  seen: {type: evaluate, init_from: taught, split: train, tasks: 5, greedy: false, record: true}
"""
STAGE = "  learned: {type: pretrain, env_steps: 960, validate_every: 4, validation_tasks: 2, "
FLAT = "network: {type: actor_critic, encoder: {type: mlp, hidden_sizes: [8]}}, "
ALGORITHMS = {
    "behavior_cloning": FLAT + "algorithm: {type: behavior_cloning, DATA}",
    "recurrent_cloning": "algorithm: {type: behavior_cloning, DATA}",
    "trial_cloning": "algorithm: {type: trial_cloning, DATA}",
    "algorithm_distillation": "algorithm: {type: algorithm_distillation, every: 2, DATA}",
    "dpt": "algorithm: {type: dpt, DATA}",
    "gail": FLAT + "algorithm: {type: gail, num_steps: 15, DATA}",
    "autoencoder": FLAT + "algorithm: {type: autoencoder, DATA}",
    "vae": FLAT + "algorithm: {type: vae, latent: 2, DATA}",
}


def configured(name, data="stage: histories", more="", settings=()):
    text = HEAD + STAGE + ALGORITHMS[name].replace("DATA", f"data: {{{data}}}") + "}\n" + more
    return parse_config(text, "offline.yaml", list(settings))


def play(config, folder):
    controller.run(config, folder, display=Display(quiet=True))
    return folder


def policies(folder):
    newest = max((folder / "commits").glob("*.json"))
    files = json.loads(newest.read_text())["files"]
    return {name: file["sha256"] for name, file in files.items()}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return play(parse_config(HEAD, "offline.yaml"), tmp_path_factory.mktemp("offline") / "run")


def spec_of(name, run, stage="histories"):
    return job_spec(configured(name, f"runs: {run}, stage: {stage}"), "learned")


def train(spec, updates):
    """Metrics of each update, by one worker and one learner."""
    learner, worker, metrics = Learner(spec), RolloutWorker(), []
    for i in range(updates):
        weights = Weights(i, learner.weights())
        trials = [worker.collect(CollectCall(spec, s, i, 0), weights, {})[1] for s in range(2)]
        metrics.append(learner.update(i, 0, trials))
    return metrics, learner


def collect(spec, worker, shard=0, iteration=0):
    weights = Weights(0, Learner(spec).weights())
    return worker.collect(CollectCall(spec, shard, iteration, 0), weights, {})[1]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_learning_lowers_the_loss(name, run):
    metrics, _ = train(spec_of(name, run), 25)
    loss = [m["discriminator_loss" if name == "gail" else "loss"] for m in metrics]
    assert np.isfinite(loss).all()
    # The first batch is seen before its scale is known.
    assert np.mean(loss[-5:]) < np.mean(loss[1:6])


@pytest.mark.parametrize("name", ALGORITHMS)
def test_any_worker_reads_the_same(name, run):
    spec, used = spec_of(name, run), RolloutWorker()
    collect(spec, used, 1, 3)
    for one, other in zip(collect(spec, used), collect(spec, RolloutWorker()), strict=True):
        for field, array in vars(one).items():
            np.testing.assert_array_equal(array, getattr(other, field), field)
    elsewhere = collect(spec, used, shard=1)[0]
    assert (elsewhere.action != collect(spec, used)[0].action).any()


def test_the_cloned_policy_is_shown_what_the_recorded_one_saw(run):
    # Under the weights that acted, the likelihoods are those that were recorded when acting.
    algorithm = build(spec_of("trial_cloning", run, "seen")).algorithm
    with RunWriter.open(run) as writer:
        set_weights(algorithm.policy, writer.load("taught.best"))
    starts = algorithm.dataset.starts["trial"].tolist()
    assert np.diff(starts).tolist() == [30] * 5
    whole = algorithm.dataset.rollout([[(s, s + 30, True)] for s in starts[:-1]], 30)
    batch = algorithm.batch([whole.map(torch.from_numpy)])
    with torch.no_grad():
        memory, previous = algorithm.empty_memory(batch), previous_in(batch)
        pi, _, _ = algorithm.policy(batch["obs"], previous, memory)
        log_prob = algorithm.policy.policy_head.log_prob(pi, batch["action"])
    steps = load(run, table="transitions").query("stage == 'seen'")
    recorded = steps["log_prob"].to_numpy().reshape(5, 30).T
    np.testing.assert_allclose(log_prob.numpy(), recorded, atol=1e-5)


def test_a_policy_that_knows_nothing_loses_the_log_of_its_choices(run):
    algorithm = build(spec_of("behavior_cloning", run)).algorithm
    nn.init.zeros_(algorithm.policy.policy_head.layer.weight)
    (rollout,) = collect(spec_of("behavior_cloning", run), RolloutWorker())
    loss, report = algorithm.loss(algorithm.batch([rollout.map(torch.from_numpy)]))
    assert loss.item() == pytest.approx(np.log(5), abs=1e-6)
    assert report["entropy"].item() == pytest.approx(np.log(5), abs=1e-6)


def test_distillation_reads_one_task_in_order_of_learning(run):
    steps = load(run, table="transitions").query("stage == 'histories'")
    version = {}
    for row in steps.itertuples():
        version.setdefault((row.obs.tobytes(), row.action, row.reward, row.t), set()).add(
            row.adaptation_step
        )
    (rollout,) = collect(spec_of("algorithm_distillation", run), RolloutWorker())
    assert rollout.reset[0].all()
    assert not rollout.reset[1:].any()
    for b in range(rollout.num_envs):
        at = 0
        for t in range(rollout.num_steps):
            key = (rollout.obs[t, b].tobytes(), rollout.action[t, b], rollout.reward[t, b], t % 15)
            assert max(version[key]) >= at
            at = max(at, min(version[key]))


@pytest.fixture(scope="module")
def gaps(run, tmp_path_factory):
    """The histories as a file of others, with three numbers that are not finite."""
    steps = load(run, table="transitions").query("stage == 'histories'")
    steps = steps.sort_values(["job", "environment", "trial", "episode", "t"]).reset_index(
        drop=True
    )
    steps["history"] = steps.groupby(["job", "environment"]).ngroup()
    steps["task_id"] = steps.groupby("task_id").ngroup()
    names = ["obs", "action", "reward", "terminated", "truncated", "next_obs", "task_id"]
    steps = steps[[*names, "history", "trial", "episode"]]
    steps.loc[7, "reward"] = np.nan
    steps.loc[100, "reward"] = np.inf
    steps.at[40, "obs"] = np.where(np.arange(25) == 3, np.nan, steps.at[40, "obs"])
    path = tmp_path_factory.mktemp("gaps") / "steps.parquet"
    steps.to_parquet(path)
    return path


@pytest.mark.parametrize("name", ALGORITHMS)
def test_rows_that_are_not_finite_are_not_learned_from(name, gaps):
    spec = job_spec(configured(name, f"files: {gaps}"), "learned")
    metrics, learner = train(spec, 5)
    assert all(np.isfinite(list(m.values())).all() for m in metrics)
    assert not any(m["skipped_batches"] for m in metrics)
    assert all(np.isfinite(array).all() for array in learner.weights().values())
    used = RolloutWorker()
    collect(spec, used, 1, 3)
    for one, other in zip(collect(spec, used), collect(spec, RolloutWorker()), strict=True):
        np.testing.assert_array_equal(one.obs, other.obs)


def test_what_is_left_out_of_the_data_is_told_once_by_every_stage(gaps, tmp_path):
    tuned = f"""\
  tuned: {{type: finetune, init_from: learned, tasks: 2, updates: 2,
    algorithm: {{type: trial_cloning, data: {{files: {gaps}}}}}}}
"""
    config = configured("trial_cloning", f"files: {gaps}", tuned)
    stages = {name: stage for name, stage in config.stages.items() if name in ("learned", "tuned")}
    alone = {"stages": stages, "algorithm": Component(type="ppo")}  # every stage has its own
    folder = play(config.model_copy(update=alone), tmp_path / "run")
    events = load(folder, table="events").query("event == 'data_skipped'")
    assert events["stage"].tolist() == ["learned", "tuned"]
    told = json.loads(events["detail"].iloc[0])
    assert told["rows"] == 3
    assert [place.split("row ")[1] for place in told["first"]] == [
        "7: reward",
        "40: obs",
        "100: reward",
    ]


def dpt(run, encoder="{type: gru, hidden_size: 8}"):
    spec = spec_of("dpt", run)
    network = parse_config(HEAD, "x", [f"network.encoder={encoder}"]).network
    return build(replace(spec, network=network)), replace(spec, network=network)


def test_after_every_number_of_transitions_stands_a_query_with_its_label(run):
    program, spec = dpt(run)
    context, query = (r.map(torch.from_numpy) for r in collect(spec, RolloutWorker()))
    batch = program.algorithm.batch([context, query])
    after = torch.where(context.truncated[..., None], context.obs[:-1], context.next_obs())
    cell, best = batch["obs"].argmax(-1), batch["action"]
    action, reward = batch["previous_action"], batch["previous_reward"]
    assert (action[0::3] == -1).all()
    assert (action[1::3] == -1).all()
    for b in (0, 1):
        inputs = (cell[1::3, b], action[2::3, b], reward[2::3, b], cell[2::3, b])
        shown = list(zip(*(x.tolist() for x in inputs), strict=True))
        place, end = context.obs[:-1, b].argmax(-1), after[:, b].argmax(-1)
        fields = (place, context.action[:, b], context.reward[:, b], end)
        lived = list(zip(*(x.tolist() for x in fields), strict=True))
        assert sorted(shown) == sorted(lived)
        assert shown != lived
        pairs = zip(cell[0::3, b].tolist(), best[:, b].tolist(), strict=True)
        known = zip(query.obs[:-1, b].argmax(-1).tolist(), query.action[:, b].tolist(), strict=True)
        assert set(pairs) <= set(known)


BANDIT = """
name: played
tasks: {type: bandit, arms: 3, pulls: 40}
network: {encoder: {type: symmetric, hidden_size: 8}}
algorithm: dpt
rollout: {shards: 1, num_envs: 2000}
stages:
  learned: {type: pretrain, env_steps: 1}
"""


def test_contexts_are_played_without_knowing_the_task_and_labelled_with_its_best_arm():
    spec = job_spec(parse_config(BANDIT, "played.yaml"), "learned")
    (played,) = collect(spec, RolloutWorker())
    best = played.expert_action[0]
    assert (played.expert_action == best).all()
    arms = (np.arange(3)[:, None, None] == played.action).mean(1)  # (arm, column) shares
    # The best of three arms pays 3/4; chosen by chance, an arm is the best in a third of the pulls.
    assert played.reward[played.action == best].mean() == pytest.approx(0.75, abs=0.01)
    assert (played.action == best).mean() == pytest.approx(1 / 3, abs=0.03)
    assert (arms.max(0) > 0.9).mean() > 0.1
    assert (arms.max(0) < 0.5).mean() > 0.1


@pytest.mark.parametrize(
    "encoder", ["{type: gru, hidden_size: 8}", "{type: transformer, hidden_size: 16}"]
)
def test_acting_asks_as_training_did(encoder, run):
    # At step t the context is the t transitions so far, in their order.
    program, _ = dpt(run, encoder)
    algorithm, policy = program.algorithm, program.policy
    nn.init.normal_(policy.policy_head.layer.weight)
    sampler = program.sampler(3)
    sampler.start(random_stream(0), 0)
    tasks = program.distribution.sample(np.random.default_rng(0), 3, "test")
    (acted,) = algorithm.play(sampler, algorithm.begin(sampler, tasks), 2)
    rollout = acted.map(torch.from_numpy)
    for t in (0, 1, 14, 15, 29):
        none = (torch.full((3,), -1), torch.zeros(3), torch.ones(3, dtype=torch.bool))
        inputs = [(rollout.obs[0], *none)]
        for k in range(t):
            done = rollout.truncated[k]
            after = torch.where(done[:, None], rollout.obs[k], rollout.obs[k + 1])
            inputs += [
                (rollout.obs[k], *none),
                (after, rollout.action[k], rollout.reward[k], done),
                (rollout.obs[k + 1], *none),
            ]
        obs, *previous = (torch.stack(x) for x in zip(*inputs, strict=True))
        pi, _, _ = policy(obs, tuple(previous), policy.initial_memory(3))
        log_prob = policy.policy_head.log_prob(pi[-1], rollout.action[t])
        torch.testing.assert_close(log_prob, rollout.log_prob[t], atol=1e-4, rtol=1e-4)


def test_the_discriminator_gives_the_rewards_and_the_table_keeps_the_environments(run):
    spec = spec_of("gail", run)
    weights, worker = Weights(0, Learner(spec).weights()), RolloutWorker()
    report, (rollout, _), _ = worker.collect(CollectCall(spec, 0, 0, 0), weights, {})
    algorithm = build(spec).algorithm
    logit = algorithm._logit(rollout.map(torch.from_numpy))
    expected = (1 + logit.detach().exp()).log().numpy()
    np.testing.assert_allclose(rollout.reward, expected, rtol=1e-5)
    returns = report.episodes["return"]  # 15 steps of -0.1 or 1
    assert (returns <= 15).all()
    assert np.allclose((returns + 1.5) / 1.1, np.rint((returns + 1.5) / 1.1), atol=1e-5)


def test_the_discriminator_moves_alone_and_the_policy_without_it(run):
    spec = spec_of("gail", run)
    trial = [r.map(torch.from_numpy) for r in collect(spec, RolloutWorker())]
    learner = Learner(spec)
    algorithm = learner.algorithm
    before = learner.weights()
    loss, _ = algorithm._discriminate(trial[1], trial[0])
    algorithm.step_optimizer(loss, ("auxiliary.discriminator.",))
    moved = {k for k, v in learner.weights().items() if (v != before[k]).any()}
    assert moved
    assert all(name.startswith("auxiliary.discriminator") for name in moved)
    before = learner.weights()
    super(type(algorithm), algorithm).update(trial[:1])
    moved = {k for k, v in learner.weights().items() if (v != before[k]).any()}
    assert "policy_head.layer.weight" in moved
    assert not any(name.startswith("auxiliary") for name in moved)


class Linear(Encoder):
    """No layer between."""

    class Config(Settings):
        size: int = 2
        """Width."""

    def __init__(self, config, obs_space, extra):
        super().__init__()
        self.layer, self.out_dim = nn.Linear(obs_space.shape[0], config.size), config.size

    def forward(self, obs, extra, memory, reset):
        return self.layer(obs), memory


def correlated(path):
    """Rows of CartPole's shape that lie close to a plane."""
    rng = np.random.default_rng(0)
    obs = rng.normal(size=(2000, 2)) @ rng.normal(size=(2, 4)) + 0.2 * rng.normal(size=(2000, 4))
    ends = np.arange(2000) % 20 == 19
    table = {
        "obs": obs.astype(np.float32).tolist(),
        "action": np.zeros(2000, int),
        "truncated": ends,
    }
    pq.write_table(pa.table(table), path)
    return path


LINEAR = """
name: linear
tasks: {type: cartpole}
network: {encoder: {type: "tests.algorithms.test_offline:Linear"}, normalize_obs: false}
rollout: {shards: 2, num_envs: 16}
learners: {threads: 1}
stages:
  learned:
    type: pretrain
    env_steps: 1
    algorithm:
      {type: autoencoder, lr: 0.01, decoder_hidden_sizes: [], num_steps: 64, data: {files: FILE}}
"""


def test_linear_layers_come_to_rebuild_what_principal_components_do(tmp_path):
    text = LINEAR.replace("FILE", str(correlated(tmp_path / "rows.parquet")))
    metrics, _ = train(job_spec(parse_config(text, "linear.yaml"), "learned"), 150)
    last = metrics[-1]
    assert metrics[0]["reconstruction_error"] > 2 * last["pca_error"]
    assert last["pca_error"] <= last["reconstruction_error"] * 1.02  # measured before the steps
    assert last["reconstruction_error"] < 1.05 * last["pca_error"]


def test_a_policy_goes_on_from_a_representation_without_its_decoder():
    then = "  then: {type: pretrain, env_steps: 1, init_from: learned, algorithm: ppo}\n"
    config = configured("vae", more=then)
    controller.check(config)
    names = [n for n, _ in build(job_spec(config, "learned")).policy.named_parameters()]
    assert any(name.startswith("auxiliary.decoder") for name in names)
    names = [n for n, _ in build(job_spec(config, "then")).policy.named_parameters()]
    assert not any(name.startswith("auxiliary") for name in names)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["stages.learned.algorithm.data.stage=history"], "no earlier stage 'history'"),
        (["stages.learned.algorithm.data.stage=taught"], "'taught' is not recorded"),
        (["stages.learned.record=true"], "record: this algorithm does not play"),
        (["stages.learned.algorithm.data={files: nowhere}"], "there is no file"),
        (["stages.learned.algorithm.data={runs: nowhere}"], "no transitions are recorded"),
    ],
)
def test_data_that_will_not_be_there_are_told_before_anything_starts(settings, message):
    with pytest.raises(ConfigError, match=message):
        controller.check(configured("trial_cloning", settings=settings))


def test_a_representation_keeps_its_last_policy_not_the_one_that_scored_by_chance(tmp_path):
    short = ["stages.histories.tasks=1", "stages.histories.updates=1"]
    folder = play(configured("vae", settings=short), tmp_path / "run")
    assert policies(folder)["learned.best"] == policies(folder)["learned.last"]


@pytest.mark.parametrize("workers", [1, 2])
def test_any_number_of_workers_learns_the_same_from_data(workers, ray_instance, tmp_path):
    none, some = (
        play(configured("algorithm_distillation", settings=[f"workers.num={n}"]), tmp_path / str(n))
        for n in (0, workers)
    )
    assert policies(none) == policies(some)
