"""RLlib's algorithms as stages of a run, on the same tasks and with the same tables.

    algorithm: {type: rllib:PPO, lr: 3e-4, model: {fcnet_hiddens: [64, 64]}}

An update is an iteration of RLlib's ``Algorithm.train``; samplers, learners and networks are
RLlib's, on its new API stack. The policy is committed as arrays, like those of other algorithms. A
run resumes from RLlib's own checkpoint of the last committed iteration; its files are the only
pickles that a run writes. Unfinished episodes and the replay buffers of SAC and DQN are not part of
RLlib's checkpoints, and start empty.
"""

from ray.rllib.algorithms.appo import APPOConfig
from ray.rllib.algorithms.dqn import DQNConfig
from ray.rllib.algorithms.impala import IMPALAConfig
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.algorithms.sac import SACConfig

from dmrl_ray.rllib.baseline import Baseline


class PPO(Baseline):
    """RLlib's PPO."""

    library = PPOConfig


class APPO(Baseline):
    """RLlib's APPO."""

    library = APPOConfig


class IMPALA(Baseline):
    """RLlib's IMPALA."""

    library = IMPALAConfig


class SAC(Baseline):
    """RLlib's SAC."""

    library = SACConfig


class DQN(Baseline):
    """RLlib's DQN."""

    library = DQNConfig
