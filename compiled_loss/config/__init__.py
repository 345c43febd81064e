"""Typed configs of the losses, a registry, and their builders."""

from compiled_loss.config.base import LossConfig, LossFromFactoryConfig
from compiled_loss.config.losses import (
    CrossEntropyConfig,
    DistillationConfig,
    FusedLinearCEConfig,
    KDLossConfig,
    LinearCrossEntropyConfig,
    LinearDistillationConfig,
    LinearSoftCrossEntropyConfig,
    MaskedCrossEntropyConfig,
    MTPLossConfig,
    MultiTokenPredictionConfig,
    TEParallelCEConfig,
)
from compiled_loss.config.registry import (
    LOSS_CONFIG_REGISTRY,
    build_loss_config,
    build_loss_module,
    register_loss_config,
)

__all__ = [
    "LOSS_CONFIG_REGISTRY",
    "CrossEntropyConfig",
    "DistillationConfig",
    "FusedLinearCEConfig",
    "KDLossConfig",
    "LinearCrossEntropyConfig",
    "LinearDistillationConfig",
    "LinearSoftCrossEntropyConfig",
    "LossConfig",
    "LossFromFactoryConfig",
    "MTPLossConfig",
    "MaskedCrossEntropyConfig",
    "MultiTokenPredictionConfig",
    "TEParallelCEConfig",
    "build_loss_config",
    "build_loss_module",
    "register_loss_config",
]
