import gymnasium as gym
import numpy as np
import pytest

from dmrl_ray.envs.cartpole import CartPole
from dmrl_ray.envs.external_env import EnvNotDeterministic
from dmrl_ray.envs.gym_env import GymEnv
from dmrl_ray.types import SPLITS, EnvironmentFault

GOOD = np.array([0.5, 0.5], np.float32)


class Toy(gym.Env):
    """Counts its steps; every fault happens at step `when` (0 is the reset)."""

    def __init__(self, when=0, fault=None, space=None, action_space=None, size=1.0):
        self.when, self.fault, self.size = when, fault, size
        self.observation_space = space or gym.spaces.Box(0, 1, (2,), np.float32)
        self.action_space = action_space or gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.returned()[0], {}

    def step(self, action):
        self.t += 1
        self.action = action
        returned = self.returned()
        return returned[:4] if self.misbehaves("old") else returned

    def misbehaves(self, fault):
        return self.fault == fault and self.t == self.when

    def returned(self):
        if self.misbehaves("raises"):
            raise KeyError("door")
        obs = self.observation()
        reward = {"nan reward": np.nan, "inf reward": -np.inf, "text reward": "1.0"}
        reward = reward[self.fault] if self.t == self.when and self.fault in reward else self.size
        terminated = "no" if self.misbehaves("text flag") else False
        return obs, reward, terminated, False, {}

    def observation(self):
        if isinstance(self.observation_space, gym.spaces.Discrete):
            return 9 if self.misbehaves("out of space") else 2
        wrong = {
            "nan obs": GOOD * np.nan,
            "huge obs": np.array([1e300, 0.5]),
            "out of space": GOOD * 4,
            "shape": np.zeros(3, np.float32),
            "none": None,
        }
        if self.t == self.when and self.fault in wrong:
            return wrong[self.fault]
        return self.np_random.random(2).astype(np.float32) if self.fault == "random" else GOOD


class Unseeded(Toy):
    """Samples from a generator that no reset seeds."""

    own = np.random.default_rng(0)

    def observation(self):
        return self.own.random(2).astype(np.float32)


class Overwriting(Toy):
    """Overwrites its size at reset."""

    def reset(self, *, seed=None, options=None):
        self.size = 2.0
        return super().reset(seed=seed)


class TaskToy(Toy):
    """Has a method `set_task`, as Meta-World's environments have."""

    def set_task(self, task):
        self.size = 10 * task["size"]


class Winning(Toy):
    """Ends after two steps, with an `is_success` from an iterator, if there is one."""

    successes = iter(())

    def step(self, action):
        *returned, _ = super().step(action)
        done = self.t >= 2
        return (
            *returned[:2],
            done,
            False,
            {"is_success": next(self.successes, None)} if done else {},
        )


class Wrapped(gym.Wrapper):
    """Has no method `set_task`."""


for kind in (Toy, Unseeded, Overwriting, TaskToy, Winning):
    gym.register(f"{kind.__name__}-v0", entry_point=kind, max_episode_steps=20)
gym.register("Endless-v0", entry_point=Toy)
gym.register("WrappedTask-v0", entry_point=lambda **kwargs: Wrapped(TaskToy(**kwargs)))


def family(env_id, **settings):
    return GymEnv(GymEnv.Config.model_validate({"id": env_id, **settings}))


def started(family, num_envs=2, seed=0):
    env = family.make_vec(num_envs)
    env.np_random = np.random.default_rng(seed)
    env.set_tasks(family.sample(np.random.default_rng(1), num_envs, "train"))
    env.reset()
    return env


def test_varied_attributes_are_the_physics():
    # The native family has the same physics: same start, same actions, same motion.
    vary = {"gravity": [5, 15], "force_mag": [5, 15]}
    adapted, native = family("CartPole-v1", vary=vary), CartPole(CartPole.Config())
    env, other = started(adapted, 1), native.make_vec(1)
    task = adapted.sample(np.random.default_rng(1), 1, "train")[0]
    standard = native.sample(np.random.default_rng(0), 1, "train")[0]
    other.set_tasks([type(task)("a", "b", "train", {**standard.params, **task.params})])
    other.reset()
    other.motion = env.envs[0].env.unwrapped.state[None]
    for action in [1, 1, 0, 1, 0, 0]:
        obs = env.step(np.array([action]))[0]
        np.testing.assert_array_equal(obs, other.step(np.array([action]))[0])


def test_tasks_can_be_arguments_of_the_constructor():
    pendulum = family("Pendulum-v1", vary={"g": [5, 15]}, apply="kwargs")
    env = started(pendulum)
    tasks = pendulum.sample(np.random.default_rng(1), 2, "train")
    assert [each.env.unwrapped.g for each in env.envs] == [t.params["g"] for t in tasks]


@pytest.mark.parametrize("env_id", ["TaskToy-v0", "WrappedTask-v0"])
def test_tasks_can_be_set_by_the_environments_own_method(env_id):
    toy = family(env_id, vary={"size": [1, 2]}, apply="set_task", max_episode_steps=5)
    reward = started(toy).step(np.array([0, 0]))[1]
    sizes = [t.params["size"] for t in toy.sample(np.random.default_rng(1), 2, "train")]
    np.testing.assert_allclose(reward, 10 * np.array(sizes), rtol=1e-6)


def test_choices_keep_the_type_the_config_gave_them():
    toy = family("Toy-v0", vary={"size": {"choices": [3, 4]}})
    env = started(toy, num_envs=8)
    sizes = [each.env.unwrapped.size for each in env.envs]
    assert {type(size) for size in sizes} == {int}
    assert set(sizes) == {3, 4}


def test_a_first_task_of_zeros_is_set():
    env = started(family("Toy-v0", vary={"size": {"choices": [0]}}))
    np.testing.assert_array_equal(env.step(np.array([0, 1]))[1], [0, 0])


def test_box_actions_are_rescaled_to_the_bounds():
    space = gym.spaces.Box(np.float32([-2, 0]), np.float32([2, 10]))
    env = started(family("Toy-v0", kwargs={"action_space": space}), 1)
    env.step(np.array([[1.0, -1.0]]))
    np.testing.assert_allclose(env.envs[0].env.unwrapped.action, [2, 0])
    env.step(np.array([[0.5, 0.0]]))
    np.testing.assert_allclose(env.envs[0].env.unwrapped.action, [1, 5])


def test_integer_observations_are_one_hot_and_spaces_may_start_anywhere():
    kwargs = {
        "space": gym.spaces.Discrete(4, start=1),
        "action_space": gym.spaces.Discrete(3, start=-1),
    }
    env = started(family("Toy-v0", kwargs=kwargs), 1)
    np.testing.assert_array_equal(env.step(np.array([2]))[0], [[0, 1, 0, 0]])
    assert env.envs[0].env.unwrapped.action == 1


def test_an_environment_that_never_ends_is_truncated():
    env = started(family("Endless-v0", max_episode_steps=3), 1)
    ends = [env.step(np.array([0]))[2:4] for _ in range(4)]
    assert [bool(truncated[0]) for _, truncated in ends] == [False, False, True, False]
    assert not any(terminated[0] for terminated, _ in ends)


def test_an_environment_that_does_not_vary_is_one_task():
    tasks = [
        (task.id, task.split)
        for env_id in ("Toy-v0", "Endless-v0")
        for split in ("train", "test")
        for task in family(env_id, max_episode_steps=9).sample(np.random.default_rng(0), 3, split)
    ]
    (toy, _), (endless, _) = tasks[0], tasks[-1]
    assert set(tasks) == {(i, split) for i in (toy, endless) for split in ("train", "test")}
    assert toy != endless


@pytest.mark.parametrize(
    ("vary", "sentence"),
    [
        ({"size": [1, 2]}, "a parameter varies over a range"),
        ({}, "nothing varies; leave it out"),
        ({"size": {"choices": [1, 2, 1.0]}}, "given twice; name each once"),
        ({"size": {"choices": [1, 2]}}, "of 2 combinations of choices, 1 for each of two splits"),
    ],
)
def test_tasks_that_cannot_be_held_out_are_refused(vary, sentence):
    with pytest.raises(ValueError, match=sentence):
        family("Toy-v0", vary=vary, held_out=1)


LENGTHS, SIZES = [0.25, 0.0, 1.0], [3, 1, 2]


@pytest.mark.parametrize("held_out", [0, 2])
def test_tasks_do_not_depend_on_the_order_of_the_parameters(held_out):
    def drawn(**vary):
        toy = family("Toy-v0", vary=vary, held_out=held_out)
        return [[t.to_json() for t in toy.sample(np.random.default_rng(0), 9, s)] for s in SPLITS]

    one = drawn(size={"choices": SIZES}, when={"choices": LENGTHS})
    assert one == drawn(when={"choices": [1.0, -0.0, 0.25]}, size={"choices": [1, 2, 3]})
    assert one == drawn(when={"choices": LENGTHS}, size={"choices": [2.0, 3.0, 1.0]})


def test_success_is_reported_for_each_environment_on_its_own():
    env = started(family("Winning-v0"), 2)
    # Both environments have episodes of two steps, and report at their ends:
    env.envs[0].env.unwrapped.successes = iter([True, np.array([False]), None, np.nan])
    env.envs[1].env.unwrapped.successes = iter([None, None, False, None])
    nothing = {"success": np.full(2, np.nan)}
    seen = [(nothing | env.step(np.zeros(2, np.int64))[4])["success"] for _ in range(8)]
    np.testing.assert_array_equal(
        seen[1::2], [[1, np.nan], [0, np.nan], [np.nan, 0], [np.nan, np.nan]]
    )
    assert np.isnan(seen[::2]).all()


@pytest.mark.parametrize("oracle", [5, 4.5])
def test_an_oracle_no_better_than_random_actions_is_refused(oracle):
    with pytest.raises(ValueError, match=r"reference\n.*oracle: .* is not more than random, 5"):
        family("Toy-v0", reference={"random": 5, "oracle": oracle})


def test_scores_come_from_the_config():
    toy = family("Toy-v0", reference={"random": 5, "oracle": 25}, episodes=2)
    reference = toy.reference(toy.sample(np.random.default_rng(0), 1, "test")[0])
    np.testing.assert_allclose(reference.score(np.array([0, 1]), np.array([5, 15])), [0, 0.5])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"id": "Cartpole-v1"}, "Did you mean: `CartPole`"),
        ({"id": "no_such_module:Env-v0"}, "cannot be imported"),
        ({"id": "Toy-v0", "kwargs": {"sise": 1}}, "sise"),
        ({"id": "CartPole-v1", "vary": {"gravty": [1, 2]}}, "vary.gravty.*mean 'gravity'"),
        ({"id": "Toy-v0", "vary": {"size": [0, 1]}, "apply": "set_task"}, "no method set_task"),
        ({"id": "Toy-v0", "vary": {"sise": [0, 1]}, "apply": "kwargs"}, "sise"),
        ({"id": "Overwriting-v0", "vary": {"size": [0, 1]}}, "overwrites this attribute at reset"),
        ({"id": "Endless-v0"}, "max_episode_steps: .*without a limit"),
        (
            {"id": "Toy-v0", "kwargs": {"space": gym.spaces.Sequence(gym.spaces.Discrete(2))}},
            "observations are a Sequence",
        ),
        (
            {"id": "Toy-v0", "kwargs": {"space": gym.spaces.Dict(note=gym.spaces.Text(3))}},
            "part 'note' of the observations is a Text",
        ),
        ({"id": "Toy-v0", "kwargs": {"action_space": gym.spaces.MultiBinary(2)}}, "actions are a"),
        (
            {"id": "Toy-v0", "kwargs": {"action_space": gym.spaces.Box(-np.inf, 1, (1,))}},
            "actions are unbounded",
        ),
    ],
    ids=lambda value: None if isinstance(value, str) else value["id"],
)
def test_a_mistake_in_the_settings_is_one_sentence(settings, message):
    with pytest.raises(ValueError, match=message) as error:
        family(settings.pop("id"), **settings)
    assert "\n" not in str(error.value)


FAULTS = {
    "raises": "raised KeyError: 'door'",
    "nan obs": "observation is nan at \\[0\\]",
    "huge obs": "observation is 1e\\+300 at \\[0\\]",
    "shape": "observation has shape \\(3,\\), its space has \\(2,\\)",
    "none": "observation is None",
    "nan reward": "reward is nan",
    "inf reward": "reward is -inf",
    "text reward": "reward is '1.0'",
    "text flag": "terminated is 'no'",
    "old": "step did not return",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_error_in_the_first_steps_is_found_before_the_run(fault):
    with pytest.raises(ValueError, match=f"Toy-v0: .* step 3: .*{FAULTS[fault]}"):
        family("Toy-v0", kwargs={"fault": fault, "when": 3})


@pytest.mark.parametrize("fault", ["raises", "nan obs", "shape", "none"])
def test_an_error_at_reset_is_found_before_the_run(fault):
    with pytest.raises(ValueError, match=f"Toy-v0: .* step 0: .*{FAULTS[fault]}"):
        family("Toy-v0", kwargs={"fault": fault, "when": 0})


@pytest.mark.parametrize("space", [None, gym.spaces.Discrete(4)])
def test_observations_outside_their_space_are_found_before_the_run(space):
    with pytest.raises(ValueError, match=r"observation is .*(outside its space|not in Discrete)"):
        family("Toy-v0", kwargs={"fault": "out of space", "when": 4, "space": space})


@pytest.mark.parametrize("fault", FAULTS)
def test_a_later_error_names_the_environment_seed_and_step(fault):
    env = started(family("Toy-v0", kwargs={"fault": fault, "when": 15}))
    seed = env.envs[0].seed
    for _ in range(14):
        env.step(np.array([0, 1]))
    message = f"Toy-v0: environment 0, episode seed {seed}, step 15: .*{FAULTS[fault]}"
    with pytest.raises(EnvironmentFault, match=message):
        env.step(np.array([0, 1]))


def test_a_nondeterministic_episode_cannot_be_restored():
    unseeded = family("Unseeded-v0")
    env = started(unseeded)
    env.step(np.array([0, 1]))
    with pytest.raises(EnvNotDeterministic, match="Unseeded-v0: environment 0: replaying the 1"):
        unseeded.make_vec(2).set_state(env.get_state())


def test_a_restored_episode_has_the_same_observation():
    toy = family("Toy-v0", kwargs={"fault": "random"})
    env, copy = started(toy), toy.make_vec(2)
    obs = env.step(np.array([0, 1]))[0]
    copy.set_state(env.get_state())
    np.testing.assert_array_equal(copy.observe(), obs)
    assert not np.array_equal(obs[0], obs[1])


def test_an_environment_whose_reset_fails_is_replaced_until_it_has_failed_three_times():
    toy = family("Toy-v0", kwargs={"fault": "raises", "when": 15})
    toy.on_fault = "restart_episode"
    env = started(toy)
    seeds, (first, second) = [e.seed for e in env.envs], env.envs
    first.env.unwrapped.when = 0
    env.reset()
    (fault,) = env.take_faults()
    assert env.envs[0] is not first
    assert env.envs[1] is second
    assert fault.detail["environment"] == fault.detail["step"] == 0
    assert fault.detail["episode_seed"] not in (*seeds, env.envs[0].seed)
    toy.config.kwargs["when"] = toy._kwargs["when"] = 0
    second.env.unwrapped.when = 0
    with pytest.raises(EnvironmentFault, match=r"environment 1, .* step 0: reset raised"):
        env.reset()
    assert len(env.take_faults()) == 2
