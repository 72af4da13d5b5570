"""Small trained runs, shared by the tests of exports to RLlib."""

from dmrl_ray.config.loading import parse_config
from dmrl_ray.control import controller
from dmrl_ray.results.display import Display

CONFIG = """
tasks: {{type: {family}}}
workers: {{num: 0}}
rollout: {{shards: 1, num_envs: 16}}
network: {{encoder: {encoder}}}
algorithm: {algorithm}
stages:
  meta: {{type: pretrain, env_steps: 1, validation_tasks: 2}}
{more}
"""


def play(folder, family, encoder, algorithm, more=""):
    """Run a config of one training stage, and `more` stages."""
    text = CONFIG.format(family=family, encoder=encoder, algorithm=algorithm, more=more)
    return controller.run(parse_config(text, "test.yaml"), folder, display=Display(quiet=True))
