"""Losses for language-model training that torch.compile turns into the fastest and leanest code there is."""

import torch as _torch

from compiled_loss import checks as _checks

_checks.torch_version(_torch.__version__)

from compiled_loss import nn as nn  # noqa: E402, not in __all__: a star import would take torch.nn's name
from compiled_loss.compat.masked_cross_entropy import masked_cross_entropy  # noqa: E402
from compiled_loss.compat.modules import (  # noqa: E402
    FusedLinearCrossEntropy,
    KDLoss,
    MaskedCrossEntropy,
    TEParallelCrossEntropy,
)
from compiled_loss.compat.pipeline import (  # noqa: E402
    MTPLosses,
    PipelineCausalLMLoss,
    calculate_loss,
    calculate_mtp_loss,
    calculate_mtp_losses,
)
from compiled_loss.config import (  # noqa: E402
    LOSS_CONFIG_REGISTRY,
    CrossEntropyConfig,
    DistillationConfig,
    FusedLinearCEConfig,
    KDLossConfig,
    LinearCrossEntropyConfig,
    LinearDistillationConfig,
    LinearSoftCrossEntropyConfig,
    LossConfig,
    LossFromFactoryConfig,
    MaskedCrossEntropyConfig,
    MTPLossConfig,
    MultiTokenPredictionConfig,
    TEParallelCEConfig,
    build_loss_config,
    build_loss_module,
    register_loss_config,
)
from compiled_loss.distributed.vocab_shard import VocabShard  # noqa: E402
from compiled_loss.engine import flops as _flops  # noqa: E402
from compiled_loss.engine.math.statistics import TokenStatistics  # noqa: E402
from compiled_loss.functional.cross_entropy import (  # noqa: E402
    LossAndStatistics,
    cross_entropy,
    linear_cross_entropy,
    linear_cross_entropy_with_statistics,
)
from compiled_loss.functional.distillation import distillation, linear_distillation  # noqa: E402
from compiled_loss.functional.distillation_statistics import (  # noqa: E402
    DistillationLoss,
    DistillationStatistics,
    distillation_with_statistics,
    linear_distillation_with_statistics,
)
from compiled_loss.functional.multi_token import (  # noqa: E402
    MultiTokenLosses,
    multi_token_losses,
    multi_token_prediction,
    multi_token_targets,
)
from compiled_loss.functional.policy import linear_policy_loss, policy_loss  # noqa: E402
from compiled_loss.functional.policy_evaluation import PolicyLoss, PolicyMetrics  # noqa: E402
from compiled_loss.functional.soft_cross_entropy import (  # noqa: E402
    linear_soft_cross_entropy,
    masked_soft_cross_entropy,
)
from compiled_loss.functional.statistics import linear_token_statistics, token_statistics  # noqa: E402
from compiled_loss.functional.token_loss import linear_logits_loss, linear_token_loss  # noqa: E402
from compiled_loss.functional.weights import make_token_weights  # noqa: E402
from compiled_loss.planner.chunking import Chunking  # noqa: E402
from compiled_loss.planner.explain import Explanation, plan  # noqa: E402

_flops.register()

__version__ = "0.1.0"

__all__ = [
    "LOSS_CONFIG_REGISTRY",
    "Chunking",
    "CrossEntropyConfig",
    "DistillationConfig",
    "DistillationLoss",
    "DistillationStatistics",
    "Explanation",
    "FusedLinearCEConfig",
    "FusedLinearCrossEntropy",
    "KDLoss",
    "KDLossConfig",
    "LinearCrossEntropyConfig",
    "LinearDistillationConfig",
    "LinearSoftCrossEntropyConfig",
    "LossAndStatistics",
    "LossConfig",
    "LossFromFactoryConfig",
    "MTPLossConfig",
    "MTPLosses",
    "MaskedCrossEntropy",
    "MaskedCrossEntropyConfig",
    "MultiTokenLosses",
    "MultiTokenPredictionConfig",
    "PipelineCausalLMLoss",
    "PolicyLoss",
    "PolicyMetrics",
    "TEParallelCEConfig",
    "TEParallelCrossEntropy",
    "TokenStatistics",
    "VocabShard",
    "build_loss_config",
    "build_loss_module",
    "calculate_loss",
    "calculate_mtp_loss",
    "calculate_mtp_losses",
    "cross_entropy",
    "distillation",
    "distillation_with_statistics",
    "linear_cross_entropy",
    "linear_cross_entropy_with_statistics",
    "linear_distillation",
    "linear_distillation_with_statistics",
    "linear_logits_loss",
    "linear_policy_loss",
    "linear_soft_cross_entropy",
    "linear_token_loss",
    "linear_token_statistics",
    "make_token_weights",
    "masked_cross_entropy",
    "masked_soft_cross_entropy",
    "multi_token_losses",
    "multi_token_prediction",
    "multi_token_targets",
    "plan",
    "policy_loss",
    "register_loss_config",
    "token_statistics",
]
