"""An update is a function of weights, optimiser state, version and trials."""

import dataclasses

import numpy as np
import pytest
import torch

from dmrl_ray.config.schema import Component, RolloutSettings
from dmrl_ray.errors import NumericalError
from dmrl_ray.jobs.learner import Learner
from dmrl_ray.jobs.spec import JobSpec, Weights
from dmrl_ray.jobs.worker import CollectCall, RolloutWorker
from dmrl_ray.types import join_shards

PPO = {"type": "ppo", "num_steps": 10}
MAML = {"type": "maml", "episodes_per_task": 2}
RL2 = {"type": "rl2"}
MLP, LSTM = {"type": "mlp", "hidden_sizes": [8]}, {"type": "lstm", "hidden_size": 8}
CASES = {"ppo": (PPO, MLP), "maml": (MAML, MLP), "rl2": (RL2, LSTM)}


def make_spec(case="ppo", shards=1, trainable=("",), **settings):
    algorithm, encoder = CASES[case]
    parts = (
        {"type": "point_goal", "horizon": 5, "episodes": 2},
        {"type": "actor_critic", "encoder": encoder},
        algorithm | settings,
    )
    parts = (Component.model_validate(part) for part in parts)
    rollout = RolloutSettings(shards=shards, num_envs=4)
    return JobSpec("s", "s", 0, *parts, rollout, trainable=trainable, env_steps=1000)


def collect(learner, version=0, shard=0):
    call = CollectCall(learner.spec, shard, version, 0)
    return RolloutWorker().collect(call, Weights(version, learner.weights()), {})[1]


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], name)


def changed(before, after):
    return {name for name in before if not np.array_equal(before[name], after[name])}


@pytest.mark.parametrize("case", CASES)
def test_the_same_update_twice_is_the_same_to_the_last_bit(case):
    spec = make_spec(case)
    learners = Learner(spec), Learner(spec)
    trial = collect(learners[0])
    for learner in learners:
        learner.update(3, 0, [trial])
    assert_same(learners[0].get_state(), learners[1].get_state())


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
@pytest.mark.parametrize("case", CASES)
def test_going_on_from_a_state_equals_not_having_stopped(case, optimizer):
    spec = make_spec(case, optimizer=optimizer, weight_decay=0.01)
    steady = Learner(spec)
    for version in range(2):
        steady.update(version, 0, [collect(steady, version)])
    resumed = Learner(spec)
    resumed.set_state(steady.get_state())
    trial = collect(steady, 2)
    for learner in (steady, resumed):
        learner.update(2, 0, [trial])
    assert_same(steady.get_state(), resumed.get_state())


def test_the_moments_of_the_optimiser_are_part_of_the_state():
    learner = Learner(make_spec())
    learner.update(0, 0, [collect(learner)])
    only_weights = Learner(make_spec())
    only_weights.load_weights(learner.weights())
    trial = collect(learner, 1)
    for each in (learner, only_weights):
        each.update(1, 0, [trial])
    assert changed(learner.weights(), only_weights.weights())


def test_going_back_to_an_early_state_forgets_the_moments_since():
    learner = Learner(make_spec())
    start, trial = learner.get_state(), collect(learner)
    learner.update(0, 0, [trial])
    once = learner.get_state()
    learner.set_state(start)
    learner.update(0, 0, [trial])
    assert_same(once, learner.get_state())


def test_a_state_does_not_change_when_its_learner_goes_on():
    learner = Learner(make_spec())
    learner.update(0, 0, [collect(learner)])
    state = learner.get_state()
    kept = {name: array.copy() for name, array in state.items()}
    learner.update(1, 0, [collect(learner, 1)])
    assert_same(state, kept)


def test_shuffles_differ_between_versions():
    spec = make_spec()
    one, other = Learner(spec), Learner(spec)
    trial = collect(one)
    one.update(0, 0, [trial])
    other.update(1, 0, [trial])
    assert changed(one.weights(), other.weights())


def test_an_update_changes_no_array_of_its_trials():
    learner = Learner(make_spec())
    (rollout,) = collect(learner)
    kept, found = [], []
    rollout.map(lambda x: kept.append(x.copy()))
    rollout.map(lambda x: x.setflags(write=False))  # as Ray hands them out
    learner.update(0, 0, [[rollout]])
    rollout.map(found.append)
    for a, b in zip(kept, found, strict=True):
        np.testing.assert_array_equal(a, b)


def test_two_shards_are_the_columns_of_one():
    spec = make_spec("maml", shards=2)
    learner = Learner(spec)
    trials = [collect(learner, shard=shard) for shard in range(2)]
    support, query = join_shards(trials)
    assert query.task_index.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    np.testing.assert_array_equal(support.reward[:, 4:], trials[1][0].reward)
    np.testing.assert_array_equal(support.obs[:, :4], trials[0][0].obs)


def non_finite(learner, version=0):
    trial = collect(learner, version)
    trial[-1].advantage[0, 0] = np.nan
    trial[-1].value_target = trial[-1].advantage
    return trial


@pytest.mark.parametrize("case", CASES)
def test_an_advantage_that_is_not_a_number_skips_the_batch(case):
    learner = Learner(make_spec(case))
    learner.update(0, 0, [collect(learner)])
    before = learner.get_state()
    metrics = learner.update(1, 0, [non_finite(learner, 1)])
    assert metrics["skipped_batches"] > 0
    assert_same(before, learner.get_state())


def test_three_non_finite_updates_in_a_row_stop_the_job():
    learner = Learner(make_spec())
    for version in range(2):
        learner.update(version, 0, [non_finite(learner, version)])
    learner.update(2, 0, [collect(learner, 2)])  # a good one starts the count again
    for version in range(2):
        learner.update(version, 0, [non_finite(learner, version)])
    with pytest.raises(NumericalError, match=r"stage 's', update 9: .*3 updates"):
        learner.update(9, 0, [non_finite(learner, 9)])


@pytest.mark.parametrize(
    ("case", "trainable"),
    [("ppo", ("policy_head", "value_head")), ("maml", ("policy_head",)), ("rl2", ("encoder",))],
)
def test_what_is_not_trainable_stays_as_it_is(case, trainable):
    learner = Learner(make_spec(case, trainable=trainable))
    before = learner.weights()
    learner.update(0, 0, [collect(learner)])
    names = {n for n, _ in learner.policy.named_parameters()}
    moved = changed(before, learner.weights()) & names
    assert moved == {n for n in names if n.startswith(trainable)}


def test_a_frozen_encoder_keeps_the_scale_of_its_input():
    learner = Learner(make_spec("maml", trainable=("policy_head",)))
    before = learner.weights()
    learner.update(0, 0, [collect(learner)])
    assert not any(name.startswith("obs_norm") for name in changed(before, learner.weights()))


def test_an_unknown_trainable_part_is_refused_with_the_known_ones():
    match = r"trainable: .*'polcy_head'.* encoder, policy_head, value_encoder, value_head"
    with pytest.raises(ValueError, match=match):
        Learner(make_spec(trainable=("polcy_head",)))


def test_weights_that_do_not_fit_are_refused_by_name():
    learner = Learner(make_spec())
    weights = learner.weights()
    weights["stranger"] = weights.pop("value_head.bias")
    weights["encoder.layers.0.weight"] = np.zeros((8, 3), np.float32)
    with pytest.raises(ValueError, match="do not fit") as caught:
        learner.load_weights(weights)
    for problem in (
        "encoder.layers.0.weight has shape (8, 3) instead of (8, 2)",
        "stranger is unknown",
        "value_head.bias is missing",
    ):
        assert problem in str(caught.value)


def test_weights_make_the_round_trip():
    one, other = Learner(make_spec()), Learner(make_spec())
    one.update(0, 0, [collect(one)])
    assert changed(one.weights(), other.weights())
    other.load_weights(one.weights())
    assert_same(one.weights(), other.weights())


def test_first_weights_depend_on_the_seed_and_the_job_alone():
    torch.manual_seed(5)
    one = Learner(make_spec()).weights()
    torch.manual_seed(6)
    assert_same(one, Learner(make_spec()).weights())


def rates(spec, updates, steps):
    """Step sizes of so many updates, of so many environment steps each."""
    learner, found = Learner(spec), []
    trial = collect(learner)
    for version in range(updates):
        learner.update(version, version * steps, [trial])
        found.append(learner.algorithm.optimizer.param_groups[0]["lr"])
    return found


@pytest.mark.parametrize("updates", [1, 4])
def test_an_annealed_step_size_falls_from_all_of_it_to_the_last_part_of_the_budget(updates):
    # Of n updates, number i has lr * (1 - i / n); the only update of a budget has all of it.
    expected = [1e-3 * (1 - i / updates) for i in range(updates)]
    spec = make_spec(anneal_lr=True)
    assert rates(spec, updates, 1000 // updates) == pytest.approx(expected)
    counted = dataclasses.replace(spec, env_steps=0, updates=updates)
    assert rates(counted, updates, 0) == pytest.approx(expected)


def test_a_long_gradient_is_shortened():
    # Plain gradient descent moves by lr * max_grad_norm in all, however long the gradient.
    settings = dict(optimizer="sgd", lr=1.0, max_grad_norm=1e-3, epochs=1, minibatches=1)
    learner = Learner(make_spec(**settings))
    before = [p.detach().clone() for p in learner.policy.parameters()]
    metrics = learner.update(0, 0, [collect(learner)])
    moved = [
        (a - b.detach()).flatten() for a, b in zip(before, learner.policy.parameters(), strict=True)
    ]
    assert metrics["grad_norm"] > 1e-2
    assert torch.cat(moved).norm().item() == pytest.approx(1e-3, rel=1e-2)


def test_a_deviation_at_its_bound_can_come_back():
    # One huge step carries log_std far over its upper bound; later ones must still have a gradient.
    learner = Learner(make_spec())
    head, algorithm = learner.policy.policy_head, learner.algorithm
    algorithm.optimizer = torch.optim.SGD(algorithm.parameters, lr=1.0)

    def step(direction):
        before = head.log_std.detach().clone()
        pi = learner.policy(torch.zeros(1, 1, 2))[0]
        algorithm.step_optimizer(-direction * 100 * head.entropy(pi).mean())
        return head.log_std.detach() - before

    for _ in range(8):
        step(+1)
    assert (step(-1) < 0).all()
