"""Configs that both checkouts run: one for each algorithm, with every stage that it supports.

They are minimal: eight units, short episodes of fixed length, three updates. A side leaves out the
stages that it refuses, which is reported.
"""

from __future__ import annotations

from typing import Any

Config = dict[str, Any]


def network(type_: str, **settings: object) -> Config:
    """Returns a policy with an encoder."""
    return {"type": "actor_critic", "encoder": {"type": type_, **settings}}


MLP = network("mlp", hidden_sizes=[8])
LSTM = network("lstm", hidden_size=8)
GRU = network("gru", hidden_size=8)
TRANSFORMER = network("transformer", hidden_size=8, layers=1, heads=2)
SYMMETRIC = network("symmetric", hidden_size=8, width=4)
BELIEF = network("belief", latent=2, hidden_sizes=[8], history={"type": "gru", "hidden_size": 8})

POINT = {"type": "point_goal", "horizon": 4}
SPARSE = {**POINT, "goal": "semicircle", "sparse_radius": 0.2, "episodes": 2}
BANDIT = {"type": "bandit", "arms": 3, "pulls": 5}
GRID = {"type": "grid_nav", "episodes": 2}
GYM = {"type": "gym", "id": "CartPole-v1", "vary": {"gravity": [5, 15]}, "max_episode_steps": 40}

OWN = {"by": "own"}
SGD = {"by": {"type": "continued", "optimizer": "sgd", "lr": 0.1, "episodes": 4}}
ADAMW = {
    "by": {
        "type": "continued",
        "optimizer": "adamw",
        "lr": 0.01,
        "weight_decay": 0.01,
        "trainable": ["policy_head"],
        "episodes": 4,
    }
}


def config(
    tasks: Config, policy: Config, algorithm: Config, updates_of: int, online: Config = OWN
) -> Config:
    """Returns a run with all stages.

    Args:
        updates_of: environment steps of an update; there are three updates.
        online: settings of the online stage, on how it adapts.
    """
    always_samples = "episodes_per_task" in algorithm  # and refuses greedy: false
    after: Config = {"init_from": "trained", "checkpoint": "last"}
    trained = {"env_steps": 3 * updates_of, "validate_every": 2, "validation_tasks": 3}
    return {
        "seed": 7,
        "evaluation_seed": 7,
        "tasks": tasks,
        "network": policy,
        "algorithm": algorithm,
        "rollout": {"shards": 2, "num_envs": 4},
        "workers": {"num": 0},
        "learners": {"threads": 1},
        # Keeps the state of the learner at each update, including the last of a job.
        "commit": {"every_updates": 1, "keep": 10_000},
        "stages": {
            "trained": {"type": "pretrain", **trained, "record": True},
            "tuned": {"type": "finetune", **after, "tasks": 2, "updates": 2},
            "online": {
                "type": "adapt",
                **after,
                "streams": 2,
                "tasks_per_stream": 2,
                "episodes_per_task": 2,
                "change": "ignore",
                **online,
            },
            "held_out": {"type": "evaluate", **after, "tasks": 3, "trials": 2, "record": True},
            "sampled": {"type": "evaluate", **after, "tasks": 3, "greedy": always_samples},
        },
    }


def without(given: Config, *stages: str) -> Config:
    """Returns the config without some stages."""
    return {**given, "stages": {n: s for n, s in given["stages"].items() if n not in stages}}


def with_stage(given: Config, name: str, **settings: object) -> Config:
    """Returns the config with further settings of a stage."""
    return {**given, "stages": {**given["stages"], name: {**given["stages"][name], **settings}}}


def unrecorded(given: Config) -> Config:
    """Returns the config for an algorithm whose rollouts cannot be recorded."""
    return with_stage(given, "trained", record=False)


def of_data(
    tasks: Config, policy: Config, algorithm: Config, updates_of: int, online: Config = OWN
) -> Config:
    """Returns a run that learns from the recordings of an earlier stage."""
    learned = unrecorded(
        config(tasks, policy, {"type": "ppo", "num_steps": 10}, updates_of, online)
    )
    data = {"stage": "played"}
    stages = {
        "first": {"type": "pretrain", "env_steps": 160, "validation_tasks": 2},
        "played": {
            "type": "finetune",
            "init_from": "first",
            "split": "train",
            "tasks": 3,
            "updates": 3,
            "rollout": {"num_envs": 2},
            "record": True,
        },
        **learned["stages"],
    }
    for stage in ("trained", "tuned"):
        stages[stage] = {**stages[stage], "algorithm": {**algorithm, "data": data}}
    stages["first"]["network"] = stages["played"]["network"] = MLP
    return {**learned, "stages": stages}


def gradient(type_: str, **settings: object) -> Config:
    """Returns settings of a gradient-based algorithm, with two tasks per shard."""
    return {"type": type_, "episodes_per_task": 2, "evaluation_steps": 2, "lr": 0.01, **settings}


WITHIN: Config = {"type": "maml", "episodes_per_task": 2, "steps_per_adaptation": 2, "lr": 0.01}
TRPO: Config = {"type": "maml", "episodes_per_task": 2, "evaluation_steps": 2, "outer": "trpo"}


def on_device(given: Config) -> Config:
    """Returns the config with on-device rollouts."""
    return {**given, "rollout": {**given["rollout"], "device": "cpu"}}


REPLAY = {"critic_hidden_sizes": [8], "gradient_steps": 3, "batch_trials": 4, "batch_steps": 4}

CASES: dict[str, Config] = {
    "maml": config(POINT, MLP, gradient("maml", inner_steps=2), 96, SGD),
    "maml_within": config(BANDIT, MLP, WITHIN, 40, ADAMW),
    "maml_trpo": config(GRID, MLP, TRPO, 240, SGD),
    "maml_on_device": on_device(config(POINT, MLP, gradient("maml"), 64, SGD)),
    "fomaml": config(POINT, LSTM, gradient("maml", first_order=True), 64, SGD),
    "anil": config(BANDIT, MLP, gradient("maml", trainable=["policy_head"]), 80, ADAMW),
    "promp": config(POINT, MLP, gradient("promp"), 64, SGD),
    "reptile": config(POINT, MLP, gradient("reptile"), 96, SGD),
    "cavia": config(POINT, {**MLP, "context": 3}, gradient("cavia"), 64, SGD),
    "meta_sgd": config(POINT, MLP, gradient("meta_sgd"), 64, SGD),
    "ppo": config(BANDIT, MLP, {"type": "ppo", "num_steps": 8}, 64, ADAMW),
    "ppo_lstm": config(POINT, LSTM, {"type": "ppo", "num_steps": 6}, 48, SGD),
    "ppo_on_device": on_device(config(POINT, MLP, {"type": "ppo", "num_steps": 6}, 48, SGD)),
    "ppo_observing": config(
        {"type": "observe", "of": GRID, "show": ["belief"]},
        MLP,
        {"type": "ppo", "num_steps": 20},
        160,
        SGD,
    ),
    "rl2": config(GRID, LSTM, {"type": "rl2"}, 240),
    "rl2_on_device": on_device(config(BANDIT, SYMMETRIC, {"type": "rl2"}, 40)),
    "rl2_transformer": config(
        {"type": "tabular_mdp", "episodes": 2}, TRANSFORMER, {"type": "rl2"}, 160
    ),
    "rl2_informative": config({"type": "informative_bandit"}, GRU, {"type": "rl2"}, 40),
    "rl2_restless": config({"type": "restless_bandit", "pulls": 6}, GRU, {"type": "rl2"}, 48),
    "varibad": config(
        SPARSE, BELIEF, {"type": "varibad", "belief_trials": 3, "replay_trials": 20}, 64
    ),
    "pearl": config(
        SPARSE, MLP, {"type": "pearl", "latent": 2, "context_hidden_sizes": [8], **REPLAY}, 64
    ),
    "stepwise_pearl": config(
        SPARSE,
        MLP,
        {
            "type": "stepwise_pearl",
            "belief_steps": 2,
            "kept_noise": 0.6,
            "latent": 2,
            "context_hidden_sizes": [8],
            **REPLAY,
        },
        64,
    ),
    "sac": config(POINT, MLP, {"type": "sac", "num_steps": 6, **REPLAY}, 48, SGD),
    "sac_discrete": config(BANDIT, MLP, {"type": "sac", "num_steps": 6, **REPLAY}, 48, ADAMW),
    "impala": with_stage(
        config(GRID, LSTM, {"type": "impala", "num_steps": 10}, 80), "trained", max_policy_lag=1
    ),
    "appo": with_stage(
        config({"type": "two_step", "rounds": 4}, MLP, {"type": "appo", "num_steps": 6}, 48),
        "trained",
        max_policy_lag=2,
    ),
    "dagger": config(BANDIT, SYMMETRIC, {"type": "dagger"}, 40),
    "dpt": unrecorded(config(BANDIT, SYMMETRIC, {"type": "dpt"}, 40)),
    "dpt_of_data": of_data(GRID, GRU, {"type": "dpt"}, 240),
    "behavior_cloning": of_data(POINT, MLP, {"type": "behavior_cloning"}, 60, SGD),
    "trial_cloning": of_data(GRID, GRU, {"type": "trial_cloning"}, 240),
    "algorithm_distillation": of_data(GRID, GRU, {"type": "algorithm_distillation"}, 240),
    "gail": of_data(
        BANDIT, MLP, {"type": "gail", "num_steps": 6, "discriminator_hidden_sizes": [8]}, 48
    ),
    "autoencoder": of_data(
        GRID, MLP, {"type": "autoencoder", "decoder_hidden_sizes": [8]}, 240, SGD
    ),
    "vae": of_data(GRID, MLP, {"type": "vae", "decoder_hidden_sizes": [8], "latent": 2}, 240, SGD),
}
"""Cases by name, all without Ray."""

GYM_CASES: dict[str, Config] = {
    "gym_ppo": config(GYM, MLP, {"type": "ppo", "num_steps": 16}, 128, SGD),
    "gym_maml": config(GYM, MLP, gradient("maml"), 400, SGD),
    "gym_rl2": config({**GYM, "episodes": 2}, LSTM, {"type": "rl2"}, 400),
}
"""Cases with episodes of variable length."""

RAY_CASES = ("maml", "ppo", "rl2", "varibad", "sac", "impala", "behavior_cloning")
"""Names of `CASES` that are also run with one worker."""
