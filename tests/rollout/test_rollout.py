"""What a sampler stores is what was lived through, and what the learner will see."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete

from dmrl_ray.errors import NumericalError
from dmrl_ray.networks.actor_critic import ActorCritic, previous_inputs
from dmrl_ray.networks.heads import SquashedGaussianHead
from dmrl_ray.rollout.sampler import Sampler
from dmrl_ray.tasks.distribution import TaskDistribution, TaskVectorEnv
from dmrl_ray.types import EnvironmentFault, Task, join_shards
from tests import matrix_family as pictures

NEVER = 99


class WalkColumns(TaskVectorEnv):
    """A noisy walk pushed by the actions; a task says when episodes terminate and truncate."""

    state_fields = ("x", "t", "present", "waiting")

    def __init__(self, family, num_envs):
        super().__init__(num_envs, family.observation_space, family.action_space)
        self.family = family
        self.x, self.t = np.zeros(num_envs), np.zeros(num_envs, np.int64)
        self.present, self.waiting = np.zeros((2, num_envs, 3))
        self.felt = []

    def set_tasks(self, tasks):
        self.waiting[:] = [[t.params[k] for k in ("terminal", "limit", "bonus")] for t in tasks]

    def begin(self, columns):
        self.present[columns] = self.waiting[columns]
        self.x[columns] = self.np_random.normal(size=len(columns))
        self.t[columns] = 0

    def observe(self):
        return np.stack([self.x, self.t / 3], 1).astype(np.float32)

    def step(self, actions):
        self.felt.append(np.array(actions))
        self.x = 0.5 * self.x + 0.1 * np.reshape(actions, (self.num_envs, -1)).sum(1)
        self.x += 0.5 * self.np_random.normal(size=self.num_envs)
        self.t += 1
        reward = self.present[:, 2] + self.t
        terminal, limit, _ = self.present.T
        ends = self.t >= terminal, self.t >= limit
        obs = self.observe()
        step, column, what = self.family.broken
        if len(self.felt) == step + 1:
            (obs if what == "obs" else reward)[column] = np.nan
        obs, infos = self.auto_reset(obs, ends[0] | ends[1])
        return obs, reward, *ends, infos

    def render(self):
        return np.zeros((1, 1, 3), np.uint8)


class Walk(TaskDistribution):
    family, max_episode_steps = "walk", 4

    def __init__(self, discrete=True, broken=(-1, 0, "")):
        self.observation_space = Box(-np.inf, np.inf, (2,), np.float32)
        self.action_space = Discrete(3) if discrete else Box(-1, 1, (2,), np.float32)
        self.broken = broken

    def make_vec(self, num_envs):
        return WalkColumns(self, num_envs)

    def sample(self, rng, n, split):
        raise NotImplementedError


def task(name="a", terminal=NEVER, limit=NEVER, bonus=0.0):
    return Task(name, "walk", "train", {"terminal": terminal, "limit": limit, "bonus": bonus})


MIXED = [task("a", terminal=3), task("b", limit=4), task("c", terminal=2, limit=2), task("d")]


def make_policy(family, encoder="mlp", sees_previous=False, **settings):
    """Far from its initial weights and norms, so that nothing is zero or one by chance."""
    torch.manual_seed(0)
    encoder = {"type": encoder} | ({"hidden_size": 8} if encoder in ("lstm", "gru") else {})
    config = ActorCritic.Config.model_validate({"encoder": encoder} | settings)
    spaces = family.observation_space, family.action_space
    policy = ActorCritic(config, *spaces, sees_previous=sees_previous)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    policy.obs_norm.update(torch.randn(50, 2) * 2 + 1)
    policy.value_norm.update(torch.randn(50) * 3 + 5)
    return policy


def rng(seed=0):
    return np.random.default_rng(seed)


def make_sampler(family, tasks=MIXED, policy=None, *, spans=False, seed=0, greedy=False):
    sampler = Sampler(family, len(tasks), memory_spans_trial=spans)
    sampler.start(rng(seed), 0, greedy=greedy)
    if policy is not None:
        sampler.begin_trial(tasks, policy)
    return sampler


def assert_same_rollout(one, other):
    leaves = []
    for rollout in (one, other):
        found = []
        rollout.map(found.append)
        leaves.append(found)
    assert len(leaves[0]) == len(leaves[1]) > 15
    for a, b in zip(*leaves, strict=True):
        np.testing.assert_array_equal(a, b)


CASES = {
    "mlp": dict(),
    "mlp_shared": dict(separate_value=False),
    "lstm_trial": dict(encoder="lstm", sees_previous=True, spans=True),
    "lstm_trial_separate": dict(
        encoder="lstm", sees_previous=True, spans=True, separate_value=True
    ),
    "gru_trial": dict(encoder="gru", sees_previous=True, spans=True),
    "lstm_episode": dict(encoder="lstm"),
    "lstm_episode_previous": dict(encoder="lstm", sees_previous=True),
    "gru_episode": dict(encoder="gru"),
}


@pytest.mark.parametrize("discrete", [True, False], ids=["discrete", "box"])
@pytest.mark.parametrize("case", CASES)
def test_the_learners_forward_reproduces_what_the_worker_did(case, discrete):
    settings = dict(CASES[case])
    spans = settings.pop("spans", False)
    family = Walk(discrete)
    policy = make_policy(family, **settings)
    sampler = make_sampler(family, policy=policy, spans=spans)
    first, second = (sampler.rollout(policy, 9) for _ in range(2))
    rollouts = [first] if spans else [first, second]  # a trial is one rollout
    for rollout in (r.map(torch.from_numpy) for r in rollouts):
        previous = previous_inputs(rollout) if policy.sees_previous else None
        inputs = rollout.obs[:-1], previous
        reset = rollout.reset if policy.recurrent else None
        pi, features, _ = policy(*inputs, rollout.initial_memory, reset)
        log_prob = policy.policy_head.log_prob(pi, rollout.action)
        torch.testing.assert_close(log_prob, rollout.log_prob)
        value = policy.value(features if policy.value_encoder is None else None, *inputs, reset)
        torch.testing.assert_close(policy.denormalize_value(value), rollout.value)


def whole_episodes(rollout, column):
    """Slices of the episodes of a column, and whether each ended inside the rollout."""
    done = (rollout.terminated | rollout.truncated)[:, column]
    ends = (np.flatnonzero(done) + 1).tolist()
    last = [] if ends and ends[-1] == len(done) else [len(done)]
    return [(a, b, b in ends) for a, b in pairwise([0, *ends, *last])]


@pytest.mark.parametrize("num_steps", [7, 8])  # 8: some episodes end with the rollout
@pytest.mark.parametrize("case", ["mlp", "mlp_shared", "lstm_episode", "lstm_episode_previous"])
def test_next_values_are_of_the_true_successor_with_the_memory_of_that_moment(case, num_steps):
    # Every episode is played again alone, from an empty memory to its true last observation.
    family = Walk()
    policy = make_policy(family, **CASES[case])
    rollout = make_sampler(family, policy=policy).rollout(policy, num_steps)
    successors = rollout.next_obs()
    for column in range(4):
        for start, stop, _ in whole_episodes(rollout, column):
            obs = np.concatenate([rollout.obs[start:stop], successors[stop - 1 : stop]])
            action = np.concatenate([[-1], rollout.action[start:stop, column]])
            reward = np.concatenate([[0], rollout.reward[start:stop, column]])
            first = np.arange(stop - start + 1) == 0
            obs, *previous = (
                torch.from_numpy(x).unsqueeze(1)
                for x in (obs[:, column], action, reward.astype(np.float32), first)
            )
            with torch.no_grad():
                features = policy(obs, previous, policy.initial_memory(1))[1]
                given = features if policy.value_encoder is None else None
                value = policy.denormalize_value(policy.value(given, obs, previous))[:, 0].numpy()
            close = dict(rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(rollout.value[start:stop, column], value[:-1], **close)
            following = value[1:] * ~rollout.terminated[start:stop, column]
            np.testing.assert_allclose(rollout.next_value[start:stop, column], following, **close)


def test_an_end_both_terminated_and_truncated_has_no_next_value():
    policy = make_policy(Walk())
    rollout = make_sampler(Walk(), policy=policy).rollout(policy, 4)
    both = rollout.terminated & rollout.truncated
    assert both[1, 2]  # task c: terminal and limit both 2
    assert (rollout.next_value[both] == 0).all()


def inputs_seen(sampler, policy, num_steps):
    """The rollout, and the previous action, reward and done shown at each step."""
    seen = []

    def actor(obs, previous, memory, reset):
        seen.append(previous)
        return policy(obs, previous, memory, reset)

    rollout = sampler.rollout(policy, num_steps, actor=actor)
    return rollout, [torch.cat(x).numpy() for x in zip(*seen, strict=True)]


def test_the_last_transition_of_an_episode_reaches_a_memory_that_spans_the_trial():
    policy = make_policy(Walk(), "lstm", sees_previous=True)
    sampler = make_sampler(Walk(), [task(limit=3, bonus=10)] * 2, policy, spans=True)
    rollout, (action, reward, done) = inputs_seen(sampler, policy, 5)
    np.testing.assert_array_equal(action[3], rollout.action[2])
    # reward = bonus + step within the episode; nothing came before the trial.
    np.testing.assert_array_equal(reward[:, 0], [0, 11, 12, 13, 11])
    np.testing.assert_array_equal(done[:, 0], [True, False, False, True, False])
    np.testing.assert_array_equal(action[0], [-1, -1])
    assert rollout.reset[0].all()
    assert not rollout.reset[1:].any()


def test_an_episodes_end_clears_everything_where_memory_is_an_episodes():
    policy = make_policy(Walk(), "lstm", sees_previous=True)
    sampler = make_sampler(Walk(), [task(limit=3, bonus=10)] * 2, policy)
    rollout, (action, reward, done) = inputs_seen(sampler, policy, 5)
    np.testing.assert_array_equal(action[3], [-1, -1])
    np.testing.assert_array_equal(reward[:, 0], [0, 11, 12, 0, 11])
    np.testing.assert_array_equal(done[:, 0], [True, False, False, True, False])
    np.testing.assert_array_equal(rollout.reset[:, 0], [True, False, False, True, False])


@pytest.mark.parametrize("spans", [True, False])
def test_previous_inputs_of_a_rollout_are_those_the_policy_saw(spans):
    policy = make_policy(Walk(), "gru", sees_previous=True)
    sampler = make_sampler(Walk(), policy=policy, spans=spans)
    for _ in range(3):  # later rollouts begin in the middle of episodes, or at their ends
        rollout, seen = inputs_seen(sampler, policy, 4)
        for told, saw in zip(previous_inputs(rollout.map(torch.from_numpy)), seen, strict=True):
            np.testing.assert_array_equal(told.numpy(), saw)


def test_without_a_reset_memory_goes_on_over_an_episodes_end():
    policy = make_policy(Walk(), "lstm", sees_previous=True)
    sampler = make_sampler(Walk(), policy=policy, spans=True)
    sampler.rollout(policy, 4)  # ends with an end of column b
    assert all((leaf != 0).all() for leaf in sampler.rollout(policy, 1).initial_memory)


def test_the_true_successor_of_every_step_is_kept():
    policy = make_policy(Walk())
    rollout = make_sampler(Walk(), policy=policy).rollout(policy, 8)
    clock = np.rint(rollout.next_obs()[..., 1] * 3)
    # Column b lives 4 steps; its successor at the end is step 4 of it, not step 0 of the next.
    np.testing.assert_array_equal(clock[:, 1], [1, 2, 3, 4, 1, 2, 3, 4])
    np.testing.assert_array_equal(np.rint(rollout.obs[:, 1, 1] * 3), [0, 1, 2, 3, 0, 1, 2, 3, 0])


def test_a_task_changes_at_the_next_reset_only():
    policy = make_policy(Walk())
    sampler = make_sampler(Walk(), [task("old", limit=3)] * 2, policy)
    sampler.rollout(policy, 1)
    sampler.continue_episodes([task("new", limit=2, bonus=10)], policy)
    rollout = sampler.rollout(policy, 4)
    np.testing.assert_array_equal(rollout.reward[:, 0], [2, 3, 11, 12])
    rows = sampler.take_episodes()
    assert [t.id for t in rows["task"]] == ["old", "old", "new", "new"]


def test_a_fresh_sampler_that_should_go_on_begins_a_trial():
    policy = make_policy(Walk())
    sampler = make_sampler(Walk())
    sampler.continue_episodes(MIXED, policy)
    assert sampler.rollout(policy, 1).reset.all()


def test_rows_of_episodes_by_hand():
    # reward = bonus + 1, 2, 3, ... Column 0: 3 steps, 6 + 30; column 1: 2 steps, 3.
    policy = make_policy(Walk())
    tasks = [task("a", terminal=3, bonus=10), task("b", limit=2)]
    sampler = make_sampler(Walk(), tasks, policy)
    for _ in range(2):
        sampler.rollout(policy, 3, adaptation_step=7)
    rows = sampler.take_episodes()
    assert [t.id for t in rows["task"]] == ["b", "a", "b", "a", "b"]
    expected = {
        "environment": [1, 0, 1, 0, 1],
        "episode": [0, 0, 1, 1, 2],
        "adaptation_step": [7] * 5,
        "return": [3, 36, 3, 36, 3],
        "length": [2, 3, 2, 3, 2],
        "step": [2, 3, 4, 6, 6],
    }
    for name, values in expected.items():
        np.testing.assert_array_equal(rows[name], values, name)
    assert len(sampler.take_episodes()["step"]) == 0


def test_the_shot_of_a_memory_that_spans_the_trial_is_the_episode():
    policy = make_policy(Walk(), "lstm", sees_previous=True)
    sampler = make_sampler(Walk(), [task(limit=2)], policy, spans=True)
    sampler.rollout(policy, 6)
    np.testing.assert_array_equal(sampler.take_episodes()["adaptation_step"], [0, 1, 2])


class Endless(pictures.Walk):
    """Pictures of walks of ten steps at most, of which the family's limit says nothing."""

    max_episode_steps = 10**10


def walked(beta=None):
    """A rollout of two episodes in each of four environments."""
    family = Endless(Endless.Config(seen="picture", varying=True))
    torch.manual_seed(0)
    spaces = family.observation_space, family.action_space
    policy = ActorCritic(ActorCritic.Config(), *spaces, sees_previous=False)
    sampler = Sampler(family, 4, memory_spans_trial=False)
    sampler.start(rng(), 0)
    sampler.begin_trial(family.sample(rng(), 4, "train"), policy, 2)
    return sampler.rollout(policy, with_value=False, beta=beta)


def test_a_rollout_takes_memory_for_the_steps_that_are_played():
    rollout = walked()
    assert rollout.num_steps <= 2 * pictures.LIMIT
    assert rollout.obs.base.nbytes < 1e6


@pytest.mark.parametrize("beta", [None, 0.5])
def test_a_rollout_is_the_same_however_its_memory_grew(beta, monkeypatch):
    at_once = walked(beta)
    monkeypatch.setattr("dmrl_ray.rollout.sampler.BLOCK_STEPS", 3)
    grown = walked(beta)
    assert grown.num_steps > 3 * 2
    assert not grown.all_count
    assert_same_rollout(at_once, grown)


def had(rows):
    """Steps and episodes that agents had had of the tasks of episodes before."""
    return rows["experience_steps"].tolist(), rows["experience_episodes"].tolist()


def test_an_agent_that_meets_a_task_again_has_had_what_it_had_of_it():
    policy = make_policy(Walk(), "lstm", sees_previous=True)
    a, b = task("a", limit=2), task("b", limit=3)
    sampler = make_sampler(Walk(), [a], policy, spans=True)
    for following, steps in ((a, 2), (b, 2), (a, 3)):
        sampler.set_tasks([following])
        sampler.rollout(policy, steps)
    sampler.rollout(policy, 2)
    rows = sampler.take_episodes()
    assert [t.id for t in rows["task"]] == ["a", "a", "b", "a"]
    assert had(rows) == ([0, 2, 0, 4], [0, 1, 0, 2])


def test_one_policy_that_goes_on_has_had_its_task_in_all_environments():
    # Two environments on one task, whose episodes have two steps, in collections of three.
    policy = make_policy(Walk())
    sampler, other = (Sampler(Walk(), 2, memory_spans_trial=False) for _ in range(2))
    for sampler_of_half in (sampler, other):
        sampler_of_half.start(rng(), 0)
    rows = []
    for number in range(2):
        player = (sampler, other)[number]
        player.set_state(sampler.get_state())
        player.continue_episodes([task("same", limit=2)] * 2, policy)
        player.rollout(policy, 3)
        rows.append(had(player.take_episodes()))
    assert rows == [([0, 0], [0, 0]), ([4, 4, 8, 8], [2, 2, 4, 4])]


def test_separate_trials_on_one_task_know_nothing_of_each_other():
    policy = make_policy(Walk())
    sampler = make_sampler(Walk(), [task("same", limit=2)] * 2, policy)
    sampler.rollout(policy, 4)
    assert had(sampler.take_episodes()) == ([0, 0, 2, 2], [0, 0, 1, 1])


def test_a_policy_that_goes_on_keeps_no_more_accounts_than_it_plays():
    policy = make_policy(Walk())
    sampler = Sampler(Walk(), 4, memory_spans_trial=False)
    sampler.start(rng(), 0)
    for number in range(9):
        sampler.continue_episodes([task(f"{number}.{b}", limit=2) for b in range(4)], policy)
        sampler.rollout(policy, 3)
    assert sampler.get_state()["had"].shape[1] <= 1 + 4 + 4


def test_tasks_take_columns_in_contiguous_equal_parts():
    policy = make_policy(Walk())
    sampler = Sampler(Walk(), 6, memory_spans_trial=False)
    sampler.start(rng(), 0)
    sampler.begin_trial([task("a", bonus=10), task("b", bonus=20), task("c", bonus=30)], policy)
    rollout = sampler.rollout(policy, 1)
    np.testing.assert_array_equal(rollout.task_index, [0, 0, 1, 1, 2, 2])
    np.testing.assert_array_equal(rollout.reward[0], [11, 11, 21, 21, 31, 31])


@pytest.mark.parametrize("case", ["mlp", "lstm_episode_previous", "gru_trial"])
def test_a_restored_sampler_continues_identically_in_the_middle_of_episodes(case):
    settings = dict(CASES[case])
    spans = settings.pop("spans", False)
    policy = make_policy(Walk(), **settings)
    sampler = make_sampler(Walk(), policy=policy, spans=spans)
    sampler.rollout(policy, 5)
    sampler.set_tasks([task("next", limit=1)])
    state = sampler.get_state()
    kept = {name: array.copy() for name, array in state.items()}
    results = []
    for other in (sampler, Sampler(Walk(), 4, memory_spans_trial=spans)):
        if other is not sampler:
            other.set_state(kept)
        other.start(rng(9), 3)
        rollout = other.rollout(policy, 6)
        results.append((rollout, other.take_episodes(), other.get_state()))
    (one, rows, after), (other, other_rows, other_after) = results
    assert [t.id for t in rows["task"]] == [t.id for t in other_rows["task"]]
    for name in rows.keys() - {"task"}:
        np.testing.assert_array_equal(rows[name], other_rows[name], name)
    other.task_index = one.task_index  # of tasks set before the state was taken
    assert_same_rollout(one, other)
    assert after.keys() == other_after.keys()
    for name in after:
        np.testing.assert_array_equal(after[name], other_after[name], name)


def test_a_state_does_not_change_when_its_sampler_goes_on():
    policy = make_policy(Walk(), "lstm")
    sampler = make_sampler(Walk(), policy=policy)
    sampler.rollout(policy, 5)
    state = sampler.get_state()
    kept = {name: array.copy() for name, array in state.items()}
    sampler.rollout(policy, 5)
    for name in kept:
        np.testing.assert_array_equal(state[name], kept[name], name)


def test_a_rollout_does_not_change_when_its_sampler_goes_on():
    policy = make_policy(Walk(), "lstm", sees_previous=True)
    sampler = make_sampler(Walk(), policy=policy)
    first = sampler.rollout(policy, 5)
    kept = first.map(np.copy)
    sampler.rollout(policy, 5)
    assert_same_rollout(first, kept)


def test_actions_are_clipped_for_the_environment_and_stored_as_sampled():
    family = Walk(discrete=False)
    policy = make_policy(family)
    torch.nn.init.constant_(policy.policy_head.log_std, 1.0)
    sampler = make_sampler(family, policy=policy)
    rollout = sampler.rollout(policy, 20)
    felt = np.stack(sampler.env.felt)
    assert np.abs(rollout.action).max() > 1
    assert np.abs(felt).max() == 1
    np.testing.assert_array_equal(felt, rollout.action.clip(-1, 1))


@pytest.mark.parametrize("discrete", [True, False], ids=["discrete", "box"])
def test_greedy_takes_the_mode(discrete):
    family = Walk(discrete)
    policy = make_policy(family)
    rollout = make_sampler(family, policy=policy, greedy=True).rollout(policy, 5)
    with torch.no_grad():
        pi = policy(torch.from_numpy(rollout.obs[:-1]))[0]
    mode = pi.argmax(-1) if discrete else pi[..., :2]
    torch.testing.assert_close(torch.from_numpy(rollout.action), mode)


def test_the_same_stream_gives_the_same_rollout():
    policy = make_policy(Walk())
    one, other = (
        make_sampler(Walk(), policy=policy, seed=seed).rollout(policy, 6) for seed in (4, 4)
    )
    assert_same_rollout(one, other)
    different = make_sampler(Walk(), policy=policy, seed=5).rollout(policy, 6)
    assert not np.array_equal(one.obs, different.obs)


@pytest.mark.parametrize("discrete", [True, False])
@pytest.mark.parametrize("what", ["obs", "reward"])
def test_a_value_that_is_not_finite_names_column_step_and_task(what, discrete):
    # What the policy would do next is not finite either, and that is not its fault.
    family = Walk(discrete, broken=(0, 1, what))
    policy = make_policy(family, sees_previous=True)
    tasks = [task("fine"), task("bad", limit=3)]
    sampler = make_sampler(family, tasks, policy)
    step = 1 if what == "obs" else 0  # an observation is the input of the step after
    match = f"walk.*{what} of environment 1 at step {step} .*nan.* task bad"
    with pytest.raises(EnvironmentFault, match=match):
        sampler.rollout(policy, 2, with_value=False)


def test_the_task_at_fault_is_named_also_when_the_column_has_another_since():
    family = Walk(broken=(0, 0, "reward"))
    policy = make_policy(family)
    sampler = make_sampler(family, [task("bad", limit=3)], policy)
    sampler.set_tasks([task("next")])
    with pytest.raises(EnvironmentFault, match="task bad"):
        sampler.rollout(policy, 5)


def test_a_last_observation_that_is_not_finite_is_found_before_the_reset_hides_it():
    family = Walk(broken=(2, 1, "obs"))
    policy = make_policy(family)
    sampler = make_sampler(family, [task("fine"), task("bad", limit=3)], policy)
    with pytest.raises(
        EnvironmentFault, match=r"final_obs of environment 1 at step 2 .*nan.* task bad"
    ):
        sampler.rollout(policy, 5)


def test_shards_side_by_side_keep_their_columns_and_final_observations():
    policy = make_policy(Walk())
    samplers = (make_sampler(Walk(), policy=policy, seed=seed) for seed in (1, 2))
    one, other = (sampler.rollout(policy, 8) for sampler in samplers)
    both = one.concatenate([one, other])
    np.testing.assert_array_equal(both.next_obs()[:, :4], one.next_obs())
    np.testing.assert_array_equal(both.next_obs()[:, 4:], other.next_obs())
    np.testing.assert_array_equal(both.task_index, [0, 1, 2, 3, 4, 5, 6, 7])
    np.testing.assert_array_equal(both.action[:, 4:], other.action)


def test_a_rollout_of_some_tasks_is_what_was_put_side_by_side():
    policy = make_policy(Walk(), "lstm")
    samplers = (make_sampler(Walk(), policy=policy, seed=seed) for seed in (1, 2))
    one, other = (
        sampler.rollout(policy, 8, adaptation_step=n * np.arange(4))
        for n, sampler in enumerate(samplers)
    )
    both = one.concatenate([one, other])
    assert_same_rollout(both.of_tasks(0, 4), one)
    assert_same_rollout(both.of_tasks(4, 8), other)


@pytest.mark.parametrize("spans", [False, True])
def test_every_environment_plays_its_episodes_and_no_step_more_counts(spans):
    # Walk's four tasks have episodes of 3, 4, 2 and no fixed end within these steps.
    tasks = [task("a", terminal=3), task("b", limit=4), task("c", terminal=2), task("d", limit=3)]
    policy = make_policy(Walk(), encoder="gru" if spans else "mlp")
    sampler = Sampler(Walk(), 4, memory_spans_trial=spans)
    sampler.start(rng(0), 0)
    sampler.begin_trial(tasks, policy, 2)
    rollout = sampler.rollout(policy)
    assert not sampler.playing
    np.testing.assert_array_equal(rollout.mask.sum(0), [6, 8, 4, 6])
    assert rollout.num_steps == 8
    assert not rollout.all_count
    rows = sampler.take_episodes()
    assert sorted(zip(rows["environment"].tolist(), rows["episode"].tolist(), strict=True)) == [
        (column, episode) for column in range(4) for episode in range(2)
    ]
    assert rows["length"].sum() == rollout.mask.sum()


def test_memory_and_previous_step_of_an_environment_that_waits_stay_as_they_were():
    tasks = [task("short", limit=2), task("long", limit=4)]
    policy = make_policy(Walk(), encoder="gru", sees_previous=True)
    sampler = Sampler(Walk(), 2, memory_spans_trial=True)
    sampler.start(rng(0), 0)
    sampler.begin_trial(tasks, policy, 1)
    rollout = sampler.rollout(policy)
    alone = Sampler(Walk(), 2, memory_spans_trial=True)
    alone.start(rng(0), 0)
    alone.begin_trial(tasks, policy, 1)
    alone.rollout(policy, 2)
    torch.testing.assert_close(sampler.memory[0][0], alone.memory[0][0], rtol=0, atol=0)
    assert not torch.equal(sampler.memory[0][1], alone.memory[0][1])
    sampler.begin_episodes(1, forget=False)
    following = sampler.rollout(policy, 1)
    np.testing.assert_array_equal(following.previous_reward[0], rollout.reward[1, 0])
    np.testing.assert_array_equal(following.previous_reward[1], rollout.reward[3, 1])
    assert following.previous_done.all()


def test_experience_counts_all_environments_of_a_task():
    # Two tasks with two environments each; episodes of 2 and 3 steps.
    tasks = [task("a", limit=2), task("b", limit=3)]
    policy = make_policy(Walk())
    sampler = Sampler(Walk(), 4, memory_spans_trial=False)
    sampler.start(rng(0), 0)
    sampler.begin_trial(tasks, policy, 2)
    sampler.rollout(policy)
    rows = sampler.take_episodes()
    seen = sorted(
        zip(
            *(rows[n].tolist() for n in ("environment", "experience_steps", "experience_episodes")),
            strict=True,
        )
    )
    assert seen == [
        (0, 0, 0),
        (0, 4, 2),
        (1, 0, 0),
        (1, 4, 2),
        (2, 0, 0),
        (2, 6, 2),
        (3, 0, 0),
        (3, 6, 2),
    ]
    sampler.begin_trial(tasks, policy, 1)
    sampler.rollout(policy)
    assert set(sampler.take_episodes()["experience_steps"]) == {0}


def test_shards_of_other_lengths_are_filled_up_with_steps_that_do_not_count():
    def collected(limit):
        sampler = Sampler(Walk(), 2, memory_spans_trial=False)
        policy = make_policy(Walk())
        sampler.start(rng(limit), 0)
        sampler.begin_trial([task("t", limit=limit)] * 2, policy, 1)
        return sampler.rollout(policy)

    short, long = collected(2), collected(3)
    whole = join_shards([[short], [long, long]])
    assert [r.mask.sum(0).tolist() for r in whole] == [[2, 2, 3, 3], [0, 0, 3, 3]]
    np.testing.assert_array_equal(whole[0].reward[:2, :2], short.reward)
    np.testing.assert_array_equal(whole[0].next_obs()[:2, :2], short.next_obs())
    assert np.isfinite(whole[0].obs).all()


@pytest.mark.parametrize("discrete", [True, False])
@pytest.mark.parametrize("greedy", [True, False])
def test_a_policy_that_diverged_is_blamed_before_an_environment_meets_its_actions(discrete, greedy):
    family = Walk(discrete)
    policy = make_policy(family)
    torch.nn.init.constant_(policy.policy_head.layer.weight, np.inf)
    sampler = make_sampler(family, policy=policy, greedy=greedy)
    sampler.policy_version = 7
    with pytest.raises(NumericalError, match=r"diverged after update 7: .* lower algorithm\.lr, "):
        sampler.rollout(policy, 3)
    assert np.isfinite(sampler.env.felt).all()
    assert discrete or not sampler.env.felt


def test_where_an_adapted_policy_diverged_its_step_size_is_named_too():
    policy = make_policy(Walk(False))
    torch.nn.init.constant_(policy.policy_head.layer.weight, np.nan)
    with pytest.raises(NumericalError, match=r"update 0 and adaptation step 2: .*size of adapt"):
        make_sampler(Walk(False), policy=policy).rollout(policy, 3, adaptation_step=2)


@pytest.mark.parametrize("head", ["discrete", "box", "squashed"])
@pytest.mark.parametrize("greedy", [True, False], ids=["greedy", "sampled"])
def test_a_policy_whose_outputs_are_infinite_has_diverged(head, greedy):
    # argmax and tanh make ordinary actions of infinite numbers.
    family = Walk(discrete=head == "discrete")
    policy = make_policy(family)
    if head == "squashed":
        policy.policy_head = SquashedGaussianHead(torch.nn.LazyLinear(4), 2)
        policy(torch.zeros(1, 1, 2))
    torch.nn.init.constant_(policy.policy_head.layer.bias, torch.inf)
    sampler = make_sampler(family, policy=policy, greedy=greedy)
    with pytest.raises(NumericalError, match="the policy diverged after update 0: "):
        sampler.rollout(policy, 3)
