"""RLlib's algorithms in the stages of a run, beside ours on the same tasks and in the same tables.

    algorithm: {type: rllib:PPO, lr: 3e-4, model: {fcnet_hiddens: [64, 64]}}

An update is an iteration of RLlib's ``Algorithm.train``; samples, learners and networks are
RLlib's, on its new API stack. The policy is committed as arrays like ours. What a run resumes from
is RLlib's own checkpoint, whose files are pickles: the one exception to "nothing on disk is a
pickle". It is of the last iteration that was committed; episodes that were open begin afresh, and
so does the replay of SAC and DQN, which RLlib's checkpoints leave out.
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
