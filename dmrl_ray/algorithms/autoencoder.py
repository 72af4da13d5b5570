"""Representation learning: encoders trained on recorded observations, before any reward is.

`Autoencoder` and the variational one (Kingma and Welling, "Auto-Encoding Variational Bayes", 2014,
arXiv:1312.6114). They train the policy's encoder; their decoders are auxiliary networks, which a
stage that starts from theirs (``init_from``) leaves behind. Beside their own metrics stand those of
probabilistic principal components of as many dimensions, fitted to the very steps at hand: the
best that a linear map of one observation can do.
"""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from dmrl_ray.algorithms.offline import Offline, empty_memory
from dmrl_ray.config.components import Size, Sizes
from dmrl_ray.learn.gradients import Batch, Report
from dmrl_ray.learn.minibatches import as_sequences, observed
from dmrl_ray.learn.pca import ProbabilisticPCA
from dmrl_ray.losses.latent import gaussian_sample
from dmrl_ray.losses.representation import negative_evidence_bound
from dmrl_ray.networks.actor_critic import ActorCritic
from dmrl_ray.networks.base import Activation, linear, stack
from dmrl_ray.rollout.sampler import Sampler
from dmrl_ray.tasks.distribution import TaskDistribution
from dmrl_ray.types import Task, Trial

LARGEST_LINEAR = 512
"""Observations with more numbers are not measured against principal components."""


class Autoencoder(Offline):
    """The encoder's features keep what an observation can be reconstructed from."""

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
        policy.auxiliary["decoder"] = decoder(config, distribution, policy, policy.encoder.out_dim)

    def collect(self, sampler: Sampler, tasks: list[Task]) -> Trial:
        """Read observations."""
        return [self.read(sampler)]

    def update(self, trial: Trial) -> dict[str, float]:
        """Minimise the error of reconstruction."""
        (rollout,), policy = trial, self.policy
        x = flat(policy, rollout.obs[:-1])
        batch = as_sequences(policy, observed(policy, rollout))
        metrics = self.fit(partial(reconstruction_loss, policy), batch, rollout)
        return metrics | linear_metrics(x, policy.encoder.out_dim)


class VAE(Offline):
    """The features give a Gaussian over latents, a sample of which reconstructs the observation."""

    class Config(Autoencoder.Config):
        latent: Size = 8
        """Dimensions of the latent space."""

        beta: float = Field(default=1.0, ge=0)
        """Weight of the divergence from the prior."""

    config: Config
    learns_to_act = False

    def __init__(self, config: Config, distribution: TaskDistribution, policy: ActorCritic) -> None:
        super().__init__(config, distribution, policy)
        policy.auxiliary["decoder"] = decoder(config, distribution, policy, config.latent)
        for name in ("mean", "log_var"):
            policy.auxiliary[name] = linear(policy.encoder.out_dim, config.latent, gain=0.1)

    def collect(self, sampler: Sampler, tasks: list[Task]) -> Trial:
        """Read observations."""
        return [self.read(sampler)]

    def update(self, trial: Trial) -> dict[str, float]:
        """Algorithm 1: maximise the evidence lower bound, a sample of the posterior for each x."""
        (rollout,), policy, latent = trial, self.policy, self.config.latent
        x = flat(policy, rollout.obs[:-1])
        batch = as_sequences(policy, observed(policy, rollout))
        noise = self.rng.standard_normal((*batch["obs"].shape[:2], latent), np.float32)
        batch["noise"] = torch.from_numpy(noise).to(rollout.reward.device)
        metrics = self.fit(partial(vae_loss, policy, beta=self.config.beta), batch, rollout)
        return metrics | linear_metrics(x, latent)


def decoder(
    config: Autoencoder.Config, distribution: TaskDistribution, policy: ActorCritic, latent: int
) -> nn.Sequential:
    """Layers from a latent to the observation as the policy's encoder has it."""
    shape = distribution.observation_space.shape or ()
    width = policy.actor_input(torch.zeros(1, 1, *shape)).numel()
    layers = stack(latent, config.decoder_hidden_sizes, config.activation)
    last = (latent, *config.decoder_hidden_sizes)[-1]
    return nn.Sequential(*layers, linear(last, width, gain=1.0))


def reconstruction_loss(policy: ActorCritic, batch: Batch) -> tuple[Tensor, Report]:
    """The mean squared error of reconstruction."""
    x, features = encode(policy, batch)
    error = (policy.auxiliary["decoder"](features) - x).square().mean()
    return error, {"loss": error, "reconstruction_error": error}


def vae_loss(policy: ActorCritic, batch: Batch, *, beta: float) -> tuple[Tensor, Report]:
    """The evidence lower bound of eq. 7, negated, with one sample of the latent."""
    x, features = encode(policy, batch)
    networks = policy.auxiliary
    mean, log_var = networks["mean"](features), networks["log_var"](features)
    sample = gaussian_sample(mean, log_var, batch["noise"])
    bound = negative_evidence_bound(x, networks["decoder"](sample), mean, log_var, beta=beta)
    loss = bound.mean()
    error = (networks["decoder"](mean) - x).square().mean()
    return loss, {"loss": loss, "reconstruction_error": error}


def encode(policy: ActorCritic, batch: Batch) -> tuple[Tensor, Tensor]:
    """(T, B, D) observations to be reconstructed, and the encoder's features."""
    obs = batch["obs"]
    x, extra = policy.actor_input(obs), policy.extra(None, obs)
    features, _ = policy.encoder(x, extra, empty_memory(policy, batch), batch.get("reset"))
    return x.flatten(2), features


@torch.no_grad()
def flat(policy: ActorCritic, obs: Tensor) -> Tensor:
    """(T B, D) observations as the encoder has them."""
    return policy.actor_input(obs).flatten(0, 1).flatten(1)


def linear_metrics(x: Tensor, latent: int) -> dict[str, float]:
    """Error and likelihood of as many principal components, where there are fewer than inputs."""
    if x.shape[1] > LARGEST_LINEAR or latent >= x.shape[1]:
        return {}
    model = ProbabilisticPCA.fit(x, latent)
    error = (model.reconstruct(x) - x).square().mean()
    likelihood = model.log_likelihood(x).mean()
    return {"pca_error": float(error), "pca_log_likelihood": float(likelihood)}
