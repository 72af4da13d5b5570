"""APPO: PPO's clipped update on data of older policies, which V-trace corrects for.

Sources: Luo et al., "IMPACT: Importance Weighted Asynchronous Architectures with Clipped Target
Networks", 2020 (arXiv:1912.00167), whose surrogate it has; Espeholt et al. 2018 (arXiv:1802.01561)
for V-trace. The target network is the policy as it is when the update begins. Left out: a target
network that outlives an update, and the circular buffer; a batch is learned from once.
"""

from __future__ import annotations

from functools import partial

from dmrl_ray.algorithms.actor_critic import updating_norms
from dmrl_ray.algorithms.impala import IMPALA, VTraceConfig, with_vtrace
from dmrl_ray.algorithms.ppo import ClipConfig, ppo_batch, ppo_loss
from dmrl_ray.config.components import Number
from dmrl_ray.types import Trial


class APPO(IMPALA):
    """Collects as IMPALA does, and updates as PPO around the policy of the V-trace targets."""

    class Config(VTraceConfig, ClipConfig):
        """V-trace and the clipped update."""

        num_steps: Number = 128
        """Steps of each environment between updates; episodes continue over updates."""

    config: Config

    def update(self, trial: Trial) -> dict[str, float]:
        """K epochs of the clipped surrogate around the target network."""
        config = self.config
        rollout, behaviour_kl = with_vtrace(self.policy, trial[0], config)
        loss = partial(ppo_loss, self.policy, clip=config.clip, value_coef=config.value_coef)
        with updating_norms(self, rollout):
            batch = ppo_batch(self.policy, rollout, config.entropy_weight(self.progress))
            metrics = self.optimize(
                loss, batch, epochs=config.epochs, minibatches=config.minibatches
            )
        return metrics | {"behaviour_kl": behaviour_kl}
