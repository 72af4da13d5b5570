"""What rolls out on a device tells and learns what it would in NumPy, and does not wait for it."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dmrl_ray.backend import TensorStream, host, permutation
from dmrl_ray.config.loading import parse_config
from dmrl_ray.config.schema import Component, RolloutSettings
from dmrl_ray.control import controller
from dmrl_ray.envs.bandit import Bandit
from dmrl_ray.envs.grid_nav import GridNav
from dmrl_ray.envs.point_goal import PointGoal
from dmrl_ray.errors import ConfigError, NumericalError
from dmrl_ray.jobs.learner import Learner
from dmrl_ray.jobs.messages import CollectCall
from dmrl_ray.jobs.spec import JobSpec, Weights, build
from dmrl_ray.jobs.worker import RolloutWorker
from dmrl_ray.networks.actor_critic import ActorCritic, previous_inputs
from dmrl_ray.results.display import Display
from dmrl_ray.results.reading import load
from dmrl_ray.rollout.device_sampler import DeviceSampler
from dmrl_ray.rollout.sampler import Sampler
from dmrl_ray.types import EnvironmentFault, Rollout, join_shards, storable

CPU = torch.device("cpu")
COLUMNS = 6
FAMILIES = {
    "bandit": Bandit(Bandit.Config(arms=3, pulls=4)),
    "grid_nav": GridNav(GridNav.Config()),
    "point_goal": PointGoal(PointGoal.Config(horizon=5)),
}
POLICIES = {
    "mlp": dict(),
    "mlp_shared": dict(separate_value=False),
    "gru_episode": dict(encoder="gru"),
    "lstm_episode": dict(encoder="lstm", sees_previous=True),
    "lstm_trial": dict(encoder="lstm", sees_previous=True, spans=True),
    "symmetric_trial": dict(encoder="symmetric", sees_previous=True, spans=True),
}
PAIRS = [
    (family, policy)
    for family in FAMILIES
    for policy in POLICIES
    if (family, policy) != ("point_goal", "symmetric_trial")  # it needs discrete actions
]


def rng(seed=0):
    return np.random.default_rng(seed)


def make_policy(family, encoder="mlp", sees_previous=False, spans=False, **settings):
    """Far from its initial weights and norms, so that nothing is zero or one by chance."""
    torch.manual_seed(0)
    encoder = {"type": encoder} | ({} if encoder == "mlp" else {"hidden_size": 8})
    config = ActorCritic.Config.model_validate({"encoder": encoder} | settings)
    spaces = family.observation_space, family.action_space
    policy = ActorCritic(config, *spaces, sees_previous=sees_previous).eval()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    policy.value_norm.update(torch.randn(50) * 3 + 5)
    return policy


def make_sampler(kind, family, policy, *, spans, greedy=False, seed=0):
    place = {"device": CPU} if kind is DeviceSampler else {}
    sampler = kind(family, COLUMNS, memory_spans_trial=spans, **place)
    sampler.start(rng(seed), 0, greedy=greedy)
    sampler.begin_trial(family.sample(rng(), COLUMNS, "train"), policy)
    return sampler


def made(family, policy, kind=DeviceSampler, **options):
    settings = POLICIES[policy]
    family = FAMILIES[family]
    network = make_policy(family, **settings)
    spans = settings.get("spans", False)
    return family, network, make_sampler(kind, family, network, spans=spans, **options)


def assert_close(one: Rollout, other: Rollout):
    leaves = []
    for rollout in (one, other):
        found = []
        rollout.map(lambda x, found=found: found.append(host(x)))
        leaves.append(found)
    assert len(leaves[0]) == len(leaves[1]) > 15
    for a, b in zip(*leaves, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5, strict=a.size > 0)


@pytest.mark.parametrize("policy", [p for p in POLICIES if p != "symmetric_trial"])
@pytest.mark.parametrize("family", ["grid_nav", "point_goal"])
def test_where_nothing_is_left_to_chance_it_is_the_rollout_of_numpy(family, policy):
    kinds = (Sampler, DeviceSampler)
    pairs = [made(family, policy, kind, greedy=True) for kind in kinds]
    samplers = [sampler for _, _, sampler in pairs]
    for num_steps in (12, 1, 23, 15):  # in the middle of episodes, and at their ends
        tasks = FAMILIES[family].sample(rng(num_steps), COLUMNS, "train")
        rollouts = []
        for _, network, sampler in pairs:
            if POLICIES[policy].get("spans"):
                sampler.begin_trial(tasks, network)
            else:
                sampler.continue_episodes(tasks, network)
            rollouts.append(sampler.rollout(network, num_steps, adaptation_step=2))
        assert_close(*rollouts)
    rows, same = (sampler.take_episodes() for sampler in samplers)
    assert len(rows["task"]) > COLUMNS
    for name in rows:
        if name == "task":
            assert [t.id for t in rows[name]] == [t.id for t in same[name]]
        else:
            np.testing.assert_allclose(rows[name].astype(float), same[name].astype(float), 1e-5)


@pytest.mark.parametrize(("family", "policy"), PAIRS)
def test_the_learners_forward_reproduces_what_was_done(family, policy):
    _, network, sampler = made(family, policy)
    rollouts = [sampler.rollout(network, 13)]
    if not sampler.memory_spans_trial:  # a trial is one rollout
        rollouts.append(sampler.rollout(network, 13))
    for rollout in rollouts:
        previous = previous_inputs(rollout) if network.sees_previous else None
        reset = rollout.reset if network.recurrent else None
        pi, features, _ = network(rollout.obs[:-1], previous, rollout.initial_memory, reset)
        log_prob = network.policy_head.log_prob(pi, rollout.action)
        torch.testing.assert_close(log_prob, rollout.log_prob, rtol=0, atol=1e-5)
        if network.value_encoder is None:
            value = network.denormalize_value(network.value(features, rollout.obs[:-1]))
            torch.testing.assert_close(value, rollout.value, rtol=0, atol=1e-4)
    assert len(torch.unique(rollout.action)) > 1


@pytest.mark.parametrize("family", FAMILIES)
def test_the_books_agree_with_the_rewards(family):
    family, network, sampler = made(family, "mlp")
    steps = family.max_episode_steps
    rollouts = [sampler.rollout(network, steps - 1), sampler.rollout(network, steps + 3)]
    reward = torch.cat([r.reward for r in rollouts])[: 2 * steps]
    rows = sampler.take_episodes()
    earned = rows["return"].reshape(2, COLUMNS)
    np.testing.assert_allclose(earned, reward.reshape(2, steps, -1).sum(1), rtol=1e-5)
    np.testing.assert_array_equal(rows["length"], steps)
    np.testing.assert_array_equal(rows["step"], np.repeat([steps, 2 * steps], COLUMNS))
    np.testing.assert_array_equal(rows["episode"], np.repeat([0, 1], COLUMNS))
    np.testing.assert_array_equal(sampler.episodes.open().length, 2)
    done = torch.cat([r.terminated | r.truncated for r in rollouts])
    assert done.nonzero()[:, 0].unique().tolist() == [steps - 1, 2 * steps - 1]


def test_actions_follow_the_policy_and_rewards_their_chance():
    family = FAMILIES["bandit"]
    network = make_policy(family)
    sampler = DeviceSampler(family, 20_000, memory_spans_trial=True, device=CPU)
    sampler.start(rng(), 0)
    (task,) = family.sample(rng(), 1, "train")
    sampler.begin_trial([task], network)
    rollout = sampler.rollout(network, 1)
    pi = network(rollout.obs[:1])[0][0, 0].softmax(-1)
    for arm, chance in enumerate(task.params["chance"]):
        pulled = rollout.action[0] == arm
        assert abs(pulled.float().mean() - pi[arm]) < 0.02
        assert abs(rollout.reward[0][pulled].mean() - chance) < 0.03


def test_the_stream_fixes_the_rollout():
    one, same, other = (made("bandit", "lstm_trial", seed=seed) for seed in (0, 0, 1))
    rollouts = [sampler.rollout(network, 9) for _, network, sampler in (one, same, other)]
    assert torch.equal(rollouts[0].action, rollouts[1].action)
    assert torch.equal(rollouts[0].reward, rollouts[1].reward)
    assert not torch.equal(rollouts[0].action, rollouts[2].action)


@pytest.mark.parametrize("policy", ["mlp", "lstm_episode"])
@pytest.mark.parametrize("family", FAMILIES)
def test_open_episodes_go_on_from_their_state(family, policy):
    family, network, sampler = made(family, policy)
    sampler.rollout(network, family.max_episode_steps + 2)
    state = sampler.get_state()
    assert all(isinstance(array, np.ndarray) for array in state.values())
    fresh = DeviceSampler(family, COLUMNS, memory_spans_trial=False, device=CPU)
    fresh.set_state(storable(state))  # as a checkpoint holds it
    tasks = family.sample(rng(8), COLUMNS, "train")
    rollouts = []
    for each in (sampler, fresh):
        each.start(rng(3), 0)
        each.continue_episodes(tasks, network)
        rollouts.append(each.rollout(network, 2 * family.max_episode_steps))
    assert_close(*rollouts)
    rows, same = sampler.take_episodes(), fresh.take_episodes()
    np.testing.assert_array_equal(rows["return"], same["return"])
    np.testing.assert_array_equal(rows["episode"], same["episode"])


def test_streams_of_a_device_have_the_moments_of_numpys():
    stream = TensorStream(rng(), CPU)
    size = (1000, 50)
    for numbers, mean, std in (
        (stream.random(size), 0.5, 12**-0.5),
        (stream.standard_normal(size, dtype=np.float32), 0, 1),
        (stream.standard_exponential(size, dtype=np.float32), 1, 1),
    ):
        assert abs(numbers.mean() - mean) < 0.02
        assert abs(numbers.std() - std) < 0.02


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_few_numbers_are_shuffled_alike_for_every_device(device):
    order = permutation(rng(3), 1000, torch.device(device))
    assert order.device.type == device
    if device == "cpu":
        np.testing.assert_array_equal(order, rng(3).permutation(1000))


class Asked(TorchDispatchMode):
    """Notes what would make the host wait for a device."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero")

    def __init__(self):
        super().__init__()
        self.found, self.seen = [], 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name = function.overloadpacket.__name__
        self.seen += 1
        masks = name == "index" and any(
            i is not None and i.dtype == torch.bool for i in arguments[1]
        )
        if name in self.WAITING or masks:
            self.found.append(name)
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize(("family", "policy"), PAIRS)
def test_the_host_asks_for_nothing_while_it_acts(family, policy):
    family, network, sampler = made(family, policy)
    act_on, found = sampler._act, []

    def watched(*arguments):
        with Asked() as asked:
            answer = act_on(*arguments)
        found.append(asked)
        return answer

    sampler._act = watched
    sampler.rollout(network, 2 * family.max_episode_steps + 1)
    (asked,) = found
    assert asked.seen > 10 * family.max_episode_steps
    assert asked.found == []


def test_what_is_not_finite_is_told_with_its_task():
    _, network, sampler = made("point_goal", "mlp")
    step = sampler.env.step

    def broken(action):
        obs, reward, *rest = step(action)
        reward[2] = torch.nan if sampler.env._steps_left == 2 else reward[2]
        return obs, reward, *rest

    sampler.env.step = broken
    with pytest.raises(
        EnvironmentFault,
        match=r"reward of environment 2 at step 2 is nan, on task [0-9a-f]{16} {'goal'",
    ):
        sampler.rollout(network, 4)


@pytest.mark.parametrize("family", ["point_goal", "bandit"])
def test_a_policy_that_diverged_is_blamed_and_not_its_environment(family):
    _, network, sampler = made(family, "mlp")
    torch.nn.init.constant_(network.policy_head.layer.weight, torch.nan)
    with pytest.raises(NumericalError, match="the policy diverged after update "):
        sampler.rollout(network, 4)


PPO = {"type": "ppo", "num_steps": 7}
RL2 = {"type": "rl2"}
MAML = {"type": "maml", "episodes_per_task": 8}
MLP, LSTM, GRU = (
    {"type": "mlp", "hidden_sizes": [8]},
    *({"type": t, "hidden_size": 8} for t in ("lstm", "gru")),
)
JOBS = {
    "ppo": ("point_goal", PPO, MLP),
    "recurrent_ppo": ("grid_nav", PPO, GRU),
    "rl2": ("grid_nav", RL2, LSTM),
    "rl2_symmetric": ("bandit", RL2, {"type": "symmetric", "updates": "taken", "hidden_size": 16}),
    "appo": ("point_goal", {"type": "appo", "num_steps": 7}, MLP),
    "maml": ("point_goal", MAML, MLP),
    "reptile": ("point_goal", {"type": "reptile", "episodes_per_task": 8, "inner_steps": 2}, MLP),
}


def make_spec(case, shards=1, num_envs=16, device="cpu", **settings):
    family, algorithm, encoder = JOBS[case]
    family = {"type": family} | ({"horizon": 5} if family == "point_goal" else {})
    parts = (family, {"encoder": encoder, "type": "actor_critic"}, algorithm | settings)
    rollout = RolloutSettings(shards=shards, num_envs=num_envs, device=device)
    return JobSpec("s", "s", 0, *map(Component.model_validate, parts), rollout, env_steps=10**9)


def train(spec, updates, worker=None, learner=None, state=None, first=0):
    """Some iterations of one shard each; also every report."""
    worker, learner = worker or RolloutWorker(), learner or Learner(spec)
    states = state or [{}] * spec.rollout.shards
    reports = []
    for version in range(first, first + updates):
        weights = Weights(version, learner.weights())
        calls = [CollectCall(spec, shard, version, 0) for shard in range(spec.rollout.shards)]
        answers = [worker.collect(c, weights, s) for c, s in zip(calls, states, strict=True)]
        reports += [report for report, _, _ in answers]
        states = [state for _, _, state in answers]
        learner.update(version, 0, [trial for _, trial, _ in answers])
    return learner, reports, states


@pytest.mark.parametrize("case", JOBS)
def test_a_job_is_fixed_by_its_seed_and_goes_on_from_its_state(case):
    spec = make_spec(case, shards=2)
    learner, _, _ = train(spec, 3)
    stopped, _, states = train(spec, 2)
    fresh = Learner(spec)
    fresh.set_state(stopped.get_state())
    resumed, _, _ = train(spec, 1, learner=fresh, state=states, first=2)
    for name, array in learner.get_state().items():
        np.testing.assert_array_equal(array, resumed.get_state()[name], name)


def test_the_learner_takes_a_trial_as_it_is():
    spec = make_spec("rl2")
    learner = Learner(spec)
    _, (rollout,), _ = RolloutWorker().collect(
        CollectCall(spec, 0, 0, 0), Weights(0, learner.weights()), {}
    )
    taken = join_shards([[rollout]])[0].map(learner._to_device)
    for name in ("obs", "action", "reward", "log_prob", "value", "advantage", "value_target"):
        assert getattr(taken, name).data_ptr() == getattr(rollout, name).data_ptr()


def test_shards_stand_side_by_side_as_those_of_numpy_do():
    _, network, sampler = made("point_goal", "lstm_episode")
    rollouts = [sampler.rollout(network, 6), sampler.rollout(network, 6)]
    arrays = [rollout.map(host) for rollout in rollouts]
    assert_close(Rollout.concatenate(rollouts), Rollout.concatenate(arrays))


def test_a_trial_pays_more_than_chance_after_some_updates():
    torch.set_num_threads(1)
    _, reports, _ = train(make_spec("rl2_symmetric", num_envs=256, lr=1e-2, epochs=2), 12)
    paid = [report.episodes["return"].mean() for report in reports]
    assert np.mean(paid[:2]) == pytest.approx(5.0, abs=0.3)
    assert np.mean(paid[-2:]) > 5.7


CONFIG = """
name: on_device
tasks: {type: point_goal, horizon: 5, episodes: 2}
network: {encoder: {type: mlp, hidden_sizes: [8]}}
algorithm: {type: ppo, num_steps: 8}
rollout: {shards: 2, num_envs: 8, device: cpu}
workers: {num: 0}
learners: {threads: 1, device: cpu}
stages:
  train: {type: pretrain, env_steps: 512, validate_every: 2, validation_tasks: 4, record: true}
  memory:
    type: pretrain
    algorithm: rl2
    network: {type: actor_critic, encoder: {type: lstm, hidden_size: 8}}
    env_steps: 320
    validation_tasks: 4
  special: {type: finetune, init_from: train, tasks: 2, updates: 1}
  held_out: {type: evaluate, init_from: memory, tasks: 4}
"""


def configured(*settings):
    return parse_config(CONFIG, "on_device.yaml", list(settings))


def test_all_stages_of_a_run_on_a_device(tmp_path):
    controller.run(configured(), tmp_path / "run", display=Display(quiet=True))
    episodes = load(tmp_path / "run")
    counts = episodes.query("split == 'train'").groupby("stage").size()
    assert counts.to_dict() == {"train": 512 // 5 - 512 // 5 % 16, "memory": 64}
    assert set(episodes["stage"]) == {"train", "memory", "special", "held_out"}
    steps = load(tmp_path / "run", table="transitions").query("stage == 'train'")
    assert len(steps) == 512


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["workers.num=2"], "rollout.device: cpu runs everything in this process, which requires"),
        (
            ["tasks={type: cartpole}"],
            "task family 'cartpole' steps in NumPy alone; use null, or one",
        ),
        (["stages.train.algorithm={type: sac}"], "rollout.device: sac rolls out in NumPy alone"),
    ],
)
def test_what_cannot_be_is_said_in_one_sentence(settings, message):
    with pytest.raises(ConfigError, match=message):
        controller.check(configured(*settings))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_missing_gpu_is_said_before_anything_starts():
    spec = make_spec("ppo", device="cuda")
    with pytest.raises(ValueError, match="PyTorch finds no GPU here"):
        build(spec)
