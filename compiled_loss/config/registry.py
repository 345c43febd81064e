"""The registry of configs by name, and the builders, which make a Module from a YAML recipe's words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from compiled_loss import checks
from compiled_loss.config import losses
from compiled_loss.config.base import LossConfig, LossFromFactoryConfig, Typed

LOSS_CONFIG_REGISTRY: dict[str, type[LossConfig]] = {}
"""Configs by the names of the losses that they build; :func:`register_loss_config` adds to it."""


def register_loss_config(name: str, config: type[LossConfig]) -> None:
    """Registers a config under a name, and under its class `module` if it has one.

    Args:
        name: the key; a name that is taken is refused.
        config: a subclass of :class:`LossConfig`.

    Returns:
        Nothing.

    Memory:
        None.

    Raises:
        ValueError: the name is taken.
        TypeError: it is no such class.

    Example:
        >>> from dataclasses import dataclass
        >>> from compiled_loss import LossConfig, build_loss_module, register_loss_config
        >>> @dataclass
        ... class MineConfig(LossConfig):
        ...     scale: float = 1.0
        ...     def build(self):
        ...         return torch.nn.Identity()
        >>> import torch
        >>> register_loss_config("Mine", MineConfig)
        >>> build_loss_module("Mine", scale=2.0)
        Identity()

    """
    checks.modules.registration(name, config, LossConfig, LOSS_CONFIG_REGISTRY)
    LOSS_CONFIG_REGISTRY[name] = config


for _config in (
    losses.MaskedCrossEntropyConfig,
    losses.FusedLinearCEConfig,
    losses.ChunkedCEConfig,
    losses.TEParallelCEConfig,
    losses.KDLossConfig,
    losses.CrossEntropyConfig,
    losses.LinearCrossEntropyConfig,
    losses.DistillationConfig,
    losses.LinearDistillationConfig,
    losses.LinearSoftCrossEntropyConfig,
    losses.MultiTokenPredictionConfig,
    losses.PolicyLossConfig,
    losses.LinearPolicyLossConfig,
    losses.PreferenceLossConfig,
    losses.LinearPreferenceLossConfig,
    losses.KTOLossConfig,
    losses.LinearKTOLossConfig,
    losses.BradleyTerryLossConfig,
):
    assert _config.module is not None
    register_loss_config(_config.module.__name__, _config)


def build_loss_config(
    loss: LossConfig | str | Callable[..., nn.Module],
    **loss_kwargs: Any,
) -> LossConfig:
    """Makes the config of a loss that is named in any of four ways.

    Args:
        loss: a config, which is returned as it is; a name of the registry; a registered loss class, known by identity
            and not by its name; or any other class or callable, which is wrapped in a :class:`LossFromFactoryConfig`.
            Dotted paths are the caller's to resolve.
        loss_kwargs: keywords of the loss; none beside a config. `chunking` may be a dict of its fields.

    Returns:
        A :class:`LossConfig`, validated.

    Memory:
        None.

    Raises:
        ValueError: keywords beside a config.
        TypeError: a config class, an `MTPLossConfig`, an unknown name, or nothing that can be called; or a keyword that
            the config of a registered loss does not have.

    Example:
        >>> from compiled_loss import build_loss_config
        >>> build_loss_config("MaskedCrossEntropy", reduction="mean")
        MaskedCrossEntropyConfig(fp32_upcast=True, ignore_index=-100, reduction='mean')

    """
    if isinstance(loss, LossConfig):
        checks.modules.no_keywords(loss_kwargs)
        return loss
    if isinstance(loss, str) and loss in LOSS_CONFIG_REGISTRY:
        return LOSS_CONFIG_REGISTRY[loss](**loss_kwargs)
    checks.modules.loss_target(loss, Typed, list(LOSS_CONFIG_REGISTRY))
    assert callable(loss)
    for config in LOSS_CONFIG_REGISTRY.values():
        if config.module is loss:
            return config(**loss_kwargs)
    return LossFromFactoryConfig(factory=loss, kwargs=dict(loss_kwargs))


def build_loss_module(
    loss: LossConfig | str | Callable[..., nn.Module],
    **loss_kwargs: Any,
) -> nn.Module:
    """Makes the loss that `build_loss_config` describes.

    Args, Memory, Raises: see :func:`build_loss_config`.

    Returns:
        The Module.

    Example:
        >>> from compiled_loss import KDLoss, build_loss_module
        >>> build_loss_module(KDLoss, temperature=2.0).temperature
        2.0

    """
    return build_loss_config(loss, **loss_kwargs).build()
