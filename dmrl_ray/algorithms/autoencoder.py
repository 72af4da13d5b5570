"""Representation learning: encoders trained on recorded observations, before any reward is.

`Autoencoder` and the variational one (Kingma and Welling, "Auto-Encoding Variational Bayes", 2014,
arXiv:1312.6114). They train the policy's encoder; their decoders are auxiliary networks, which a
stage that starts from theirs (``init_from``) leaves behind. Beside their own figures stand those of
probabilistic principal components of as many dimensions, fitted to the very steps at hand: what a
linear map of one observation can do.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from dmrl_ray.algorithms.offline import Offline
from dmrl_ray.config.components import Size, Sizes
from dmrl_ray.losses.latent import gaussian_sample
from dmrl_ray.losses.representation import ProbabilisticPCA, negative_evidence_bound
from dmrl_ray.networks.actor_critic import ActorCritic
from dmrl_ray.networks.base import Activation, linear, stack
from dmrl_ray.tasks.distribution import TaskDistribution
from dmrl_ray.types import Trial

LARGEST_LINEAR = 512
"""Observations with more numbers are not measured against principal components."""


class Autoencoder(Offline):
    """What an encoder keeps of an observation is what it can be rebuilt from."""

    class Config(Offline.Config):
        read_with: ClassVar = {"activation": ("decoder_hidden_sizes", ())}

        decoder_hidden_sizes: Sizes = (64,)
        """Widths of the decoder's layers between features and observation."""

        activation: Activation = "relu"
        """Between the decoder's layers."""

    config: Config
    learns_to_act = False

    def __init__(self, config: Config, distribution: TaskDistribution, policy: ActorCritic) -> None:
        super().__init__(config, distribution, policy)
        shape = distribution.observation_space.shape or ()
        self.width = policy.actor_input(torch.zeros(1, 1, *shape)).numel()
        layers = stack(self.latent, config.decoder_hidden_sizes, config.activation)
        last = (self.latent, *config.decoder_hidden_sizes)[-1]
        policy.auxiliary["decoder"] = nn.Sequential(*layers, linear(last, self.width, gain=1.0))

    @property
    def latent(self) -> int:
        """Numbers that an observation is rebuilt from."""
        return self.policy.encoder.out_dim

    def batch(self, trial: Trial) -> dict[str, Tensor]:
        (rollout,) = trial
        batch = self.inputs(rollout)
        if isinstance(self, VAE):
            shape = (*batch["obs"].shape[:2], self.latent)
            noise = torch.from_numpy(self.rng.standard_normal(shape, np.float32))
            batch["noise"] = noise.to(rollout.reward.device)
        return batch

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        x, features = self.encode(batch)
        error = (self.policy.auxiliary["decoder"](features) - x).square().mean()
        return error, {"reconstruction_error": error}

    def encode(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(T, B, D) what is to be rebuilt, and the encoder's features."""
        policy, obs = self.policy, batch["obs"]
        x = policy.actor_input(obs)
        extra = policy.extra(None, obs)
        features, _ = policy.encoder(x, extra, self.empty_memory(batch), batch.get("reset"))
        return x.flatten(2), features

    def update(self, trial: Trial) -> dict[str, float]:
        with torch.no_grad():
            x = self.policy.actor_input(trial[0].obs[:-1]).flatten(0, 1).flatten(1)
        metrics = super().update(trial)
        if self.width > LARGEST_LINEAR or self.latent >= self.width:
            return metrics
        linear_model = ProbabilisticPCA.fit(x, self.latent)
        error = (linear_model.reconstruct(x) - x).square().mean()
        likelihood = linear_model.log_likelihood(x).mean()
        return metrics | {"pca_error": float(error), "pca_log_likelihood": float(likelihood)}


class VAE(Autoencoder):
    """The features lead to a Gaussian over latents, of which a sample is enough to rebuild."""

    class Config(Autoencoder.Config):
        latent: Size = 8
        """Dimensions of the latent space."""

        beta: float = Field(default=1.0, ge=0)
        """Weight of the divergence from the prior."""

    config: Config

    def __init__(self, config: Config, distribution: TaskDistribution, policy: ActorCritic) -> None:
        super().__init__(config, distribution, policy)
        for name in ("mean", "log_var"):
            policy.auxiliary[name] = linear(policy.encoder.out_dim, config.latent, gain=0.1)

    @property
    def latent(self) -> int:
        return self.config.latent

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        x, features = self.encode(batch)
        auxiliary = self.policy.auxiliary
        mean, log_var = auxiliary["mean"](features), auxiliary["log_var"](features)
        rebuilt = auxiliary["decoder"](gaussian_sample(mean, log_var, batch["noise"]))
        loss = negative_evidence_bound(x, rebuilt, mean, log_var, beta=self.config.beta).mean()
        error = (auxiliary["decoder"](mean) - x).square().mean()
        return loss, {"reconstruction_error": error}
