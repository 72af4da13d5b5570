"""Layers of dense and convolutional encoders, and what can stand between them.

Modules that are put between layers have names of their own, so that weights fit whether a network
has them or not.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable

import torch
from pydantic import Field
from torch import Tensor, nn

from dmrl_ray.config.schema import LARGEST_SIZE, Settings
from dmrl_ray.networks.base import ACTIVATIONS, Activation, linear


class LayerConfig(Settings):
    """Settings of every encoder of layers."""

    activation: Activation = "relu"
    """Between the layers; tanh costs more than a 64-wide layer does on a CPU."""

    layer_norm: bool = False
    """Normalise each layer's outputs over its units or feature maps (arXiv:1607.06450)."""

    batch_norm: bool = False
    """Normalise each unit over the batch; acting takes running statistics (arXiv:1502.03167)."""

    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of units that are left out in a gradient step of the learner."""

    adapters: int = Field(default=0, ge=0, le=LARGEST_SIZE)
    """Width of the bottleneck behind each dense layer; 0 is none (arXiv:1902.00751)."""


class BatchNorm(nn.BatchNorm1d):
    """Over all axes but the last; statistics stand still where the weights are frozen."""

    def forward(self, input: Tensor) -> Tensor:
        return _normalized(self, super().forward, input.flatten(0, -2)).reshape(input.shape)


class ImageBatchNorm(nn.BatchNorm2d):
    """Normalizes feature maps (N, C, H, W); statistics stand still where the weights are frozen."""

    def forward(self, input: Tensor) -> Tensor:
        return _normalized(self, super().forward, input)


class ImageLayerNorm(nn.Module):
    """Normalizes feature maps (N, C, H, W) over all but N; `nn.GroupNorm` cannot be vmapped."""

    def __init__(self, maps: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(maps, 1, 1))
        self.bias = nn.Parameter(torch.zeros(maps, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x, x.shape[1:]) * self.weight + self.bias


def _normalized(
    norm: nn.BatchNorm1d | nn.BatchNorm2d, forward: Callable[[Tensor], Tensor], x: Tensor
) -> Tensor:
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None
    assert variance is not None
    if norm.training and norm.weight.requires_grad:
        before = mean.clone(), variance.clone()
        y = forward(x)
        # A batch that is not finite gives no gradient step, and shall leave nothing here either.
        # Autograd, which does not read them, would take a change of them for one of its inputs'.
        for running, kept in zip((mean, variance), before, strict=True):
            running.data.copy_(torch.where(torch.isfinite(running), running, kept))
        return y
    return nn.functional.batch_norm(x, mean, variance, norm.weight, norm.bias, eps=norm.eps)


class Adapter(nn.Module):
    """A bottleneck that is added to what it reads, and adds nothing at first.

    Source: Houlsby et al., "Parameter-Efficient Transfer Learning for NLP", 2019, figure 2
    (arXiv:1902.00751).
    """

    def __init__(self, width: int, bottleneck: int, activation: Activation) -> None:
        super().__init__()
        self.down = linear(width, bottleneck, gain=math.sqrt(2))
        self.activation = ACTIVATIONS[activation]()
        self.up = linear(bottleneck, width, gain=0.0)

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = self.up(self.activation(self.down(x)))
        return x + added


def dense(width: int, sizes: tuple[int, ...], config: LayerConfig) -> nn.Sequential:
    """Fully connected layers; each is a linear one, then norms, activation, dropout, adapter.

    Inputs are (N, width): a third axis would make views of what is written in place, whose
    gradients autograd copies.
    """
    modules: OrderedDict[str, nn.Module] = OrderedDict()
    for i, size in enumerate(sizes):
        modules[f"{2 * i}"] = linear(width, size, gain=math.sqrt(2))
        if config.layer_norm:
            modules[f"layer_norm{i}"] = nn.LayerNorm(size)
        if config.batch_norm:
            modules[f"batch_norm{i}"] = BatchNorm(size)
        # In place, since nothing else reads what the layer before it wrote.
        in_place = config.activation == "relu"
        modules[f"{2 * i + 1}"] = (
            nn.ReLU(inplace=True) if in_place else ACTIVATIONS[config.activation]()
        )
        if config.dropout:
            modules[f"dropout{i}"] = nn.Dropout(config.dropout)
        if config.adapters:
            modules[f"adapter{i}"] = Adapter(size, config.adapters, config.activation)
        width = size
    return nn.Sequential(modules)


def map_norms(maps: int, config: LayerConfig) -> OrderedDict[str, nn.Module]:
    """Normalization of feature maps (N, C, H, W), by name."""
    modules: OrderedDict[str, nn.Module] = OrderedDict()
    if config.layer_norm:
        modules["layer_norm"] = ImageLayerNorm(maps)
    if config.batch_norm:
        modules["batch_norm"] = ImageBatchNorm(maps)
    return modules
