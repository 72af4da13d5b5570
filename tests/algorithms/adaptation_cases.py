"""Small gradient-based algorithms and trials of theirs, for tests of what they learn from."""

import numpy as np
import torch
from gymnasium.spaces import Box

from dmrl_ray.config.components import import_class
from dmrl_ray.envs.bandit import Bandit
from dmrl_ray.envs.point_goal import PointGoal
from dmrl_ray.learn.per_task import share_of_tasks, task_pi
from dmrl_ray.networks.actor_critic import ActorCritic
from dmrl_ray.rollout.sampler import Sampler

HORIZON, COLUMNS = 6, 4


class PointImages(PointGoal):
    """Points that are seen as images, whose first two pixels are where the point is."""

    def __init__(self, config):
        super().__init__(config)
        self.observation_space = Box(0, 255, (4, 4, 1), np.uint8)

    def make_vec(self, num_envs):
        env = super().make_vec(num_envs)
        observe = env.observe

        def image():
            pixels = np.zeros((num_envs, 4, 4, 1), np.uint8)
            pixels[:, 0, :2, 0] = np.clip(128 + 100 * observe(), 0, 255)
            return pixels

        env.observe = image
        return env


def make_algorithm(kind="maml", encoder=None, tasks="point_goal", context=0, **settings):
    """An algorithm on 6 steps of a small family, with weights far enough from zero to matter."""
    torch.manual_seed(0)
    if tasks == "bandit":
        family = Bandit(Bandit.Config(arms=3, pulls=HORIZON))
    else:
        points = {"point_goal": PointGoal, "images": PointImages}[tasks]
        family = points(PointGoal.Config(horizon=HORIZON))
    encoder = encoder or {"type": "mlp", "hidden_sizes": [8], "activation": "tanh"}
    network = ActorCritic.Config.model_validate({"encoder": encoder, "context": context})
    spaces = family.observation_space, family.action_space
    kind = import_class(kind, "algorithm") if isinstance(kind, str) else kind
    policy = ActorCritic(network, *spaces, sees_previous=kind.memory_spans_trial)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if name != "context":
                parameter += 0.2 * torch.randn_like(parameter)
    config = {"episodes_per_task": COLUMNS} | settings
    algorithm = kind(kind.Config.model_validate(config), family, policy)
    policy.eval()
    algorithm.prepare_training()
    return algorithm


def one_trial(algorithm, num_tasks=3, seed=0):
    """What a learner gets of one collection."""
    columns = num_tasks * algorithm.envs_per_task
    sampler = Sampler(algorithm.distribution, columns, memory_spans_trial=False)
    sampler.start(np.random.default_rng(seed), 0)
    tasks = algorithm.distribution.sample(np.random.default_rng(seed), num_tasks, "train")
    return [rollout.map(torch.from_numpy) for rollout in algorithm.collect(sampler, tasks)]


def in_double(algorithm, trial):
    """The same in float64, for finite differences."""
    algorithm.policy.double()
    return [r.map(lambda x: x.double() if x.dtype == torch.float32 else x) for r in trial]


def outer_loss(maml, trial):
    """MAML's, at the parameters as they are."""
    return maml.meta_loss(trial, maml.outer_advantage(trial))[0]


def own_loss(maml, trial, loss=None, *tensors):
    """A loss of a learner's share of the tasks, MAML's unless given; its batch and its weight."""
    loss, tensors = loss or maml.meta_loss, (maml.outer_advantage(trial), *tensors)
    ranks = {"rank": maml.rank, "world_size": maml.world_size}
    return share_of_tasks(lambda *batch: loss(*batch)[0], trial, *tensors, **ranks)


def outer_gradient(maml, trial, *loss):
    """The gradient of `own_loss` at the parameters as they are, by name."""
    maml.policy.zero_grad()
    loss, batch, weight = own_loss(maml, trial, *loss)
    (weight * loss(batch)[0]).backward()
    return {n: p.grad.clone() for n, p in maml.policy.named_parameters() if p.grad is not None}


def pis(algorithm, params, rollouts):
    """Distributions of each rollout's actions."""
    return [task_pi(algorithm.policy, *pair) for pair in zip(params, rollouts, strict=True)]


def numbers_of(policy, names):
    """Every number of these parameters: its name and place, and a function that sets it."""
    for name, parameter in policy.named_parameters():
        if name in names:
            flat = parameter.data.view(-1)
            for i in range(len(flat)):
                yield name, i, flat


def slope(loss, flat, i, step=1e-6):
    """The derivative of a loss by one number, from both sides."""
    value = flat[i].item()
    ends = []
    for end in (value + step, value - step):
        flat[i] = end
        ends.append(loss())
    flat[i] = value
    return (ends[0] - ends[1]) / (2 * step)
