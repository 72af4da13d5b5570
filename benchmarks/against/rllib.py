"""RLlib's PPO with the settings of the match, and an LSTM for tasks with memory.

RLlib's own defaults (30 epochs, minibatches of 128) would not be comparable. CartPole is
gymnasium's, stepped as by default in RLlib; a bandit is our vector environment. Two samplers with
one thread of PyTorch each, and the learner in the driver.
"""

from __future__ import annotations

import math
from typing import Any

from benchmarks.against.match import Clock, Match

NEEDS = ("ray.rllib",)
SAMPLERS = 2


def train(match: Match) -> Clock:
    """Trains until the clock is over."""
    import ray
    import torch

    from dmrl_ray.cluster.connection import connect

    torch.set_num_threads(1)
    connect("local", match.config)  # with one thread in each process
    algorithm = config_of(match).build_algo()
    clock = Clock(match)
    try:
        while True:
            result = algorithm.train()["env_runners"]
            newest = float(result.get("episode_return_mean", math.nan))
            steps = int(result["num_env_steps_sampled_lifetime"])
            if clock.update(steps, None if math.isnan(newest) else newest):
                return clock
    finally:
        algorithm.stop()
        ray.shutdown()


def config_of(match: Match) -> Any:
    """Returns RLlib's config of a match."""
    from ray.rllib.algorithms.ppo import PPOConfig
    from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig

    from dmrl_ray.rllib import register

    config = PPOConfig().framework("torch")
    vectors: dict[str, Any] = {}
    if match.memory:
        register("matched", match.config.tasks.model_dump(), whole_trials=True, previous="flat")
        config.environment("matched")
        vectors = {"gym_env_vectorize_mode": "vector_entry_point"}
    else:
        config.environment("CartPole-v1")
    config.env_runners(
        num_env_runners=SAMPLERS,
        num_envs_per_env_runner=match.num_envs // SAMPLERS,
        rollout_fragment_length=match.num_steps,
        **vectors,
    )
    config.training(
        lr=match.lr,
        gamma=match.gamma,
        lambda_=match.gae_lambda,
        clip_param=match.clip,
        entropy_coeff=match.entropy_coef,
        vf_loss_coeff=match.value_coef,
        vf_clip_param=float("inf"),
        use_kl_loss=False,
        grad_clip=match.max_grad_norm,
        grad_clip_by="global_norm",
        num_epochs=match.epochs,
        minibatch_size=match.batch // match.minibatches,
        train_batch_size_per_learner=match.batch,
    )
    network: dict[str, Any] = {
        "fcnet_hiddens": list(match.hidden),
        "fcnet_activation": match.activation,
        "head_fcnet_hiddens": [],
        "vf_share_layers": bool(match.memory),
    }
    if match.memory:
        network["fcnet_hiddens"] = [16]  # RLlib requires a layer before an LSTM.
        network |= {
            "use_lstm": True,
            "lstm_cell_size": match.memory,
            "max_seq_len": match.num_steps,
        }
    config.rl_module(model_config=DefaultModelConfig(**network))
    config.reporting(min_time_s_per_iteration=0, metrics_num_episodes_for_smoothing=match.target[1])
    config.debugging(seed=0, log_level="ERROR")
    return config
