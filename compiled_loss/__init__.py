"""Losses for language-model training that never hold the logits, in plain PyTorch for `torch.compile`."""

import torch as _torch

from compiled_loss import checks as _checks

_checks.torch_version(_torch.__version__)

from compiled_loss import nn as nn  # noqa: E402, not in __all__: a star import would take torch.nn's name
from compiled_loss.compat.calculate import (  # noqa: E402
    MTPLosses,
    calculate_loss,
    calculate_mtp_loss,
    calculate_mtp_losses,
)
from compiled_loss.compat.linear import (  # noqa: E402
    ChunkedCrossEntropy,
    FusedLinearCrossEntropy,
    prepare_lm_weight,
)
from compiled_loss.compat.listmle import listmle_loss  # noqa: E402
from compiled_loss.compat.masked_cross_entropy import masked_cross_entropy  # noqa: E402
from compiled_loss.compat.modules import (  # noqa: E402
    KDLoss,
    MaskedCrossEntropy,
    TEParallelCrossEntropy,
)
from compiled_loss.compat.pipeline import PipelineCausalLMLoss  # noqa: E402
from compiled_loss.config import (  # noqa: E402
    LOSS_CONFIG_REGISTRY,
    BradleyTerryLossConfig,
    ChunkedCEConfig,
    CrossEntropyConfig,
    DistillationConfig,
    FusedLinearCEConfig,
    KDLossConfig,
    KTOLossConfig,
    LinearCrossEntropyConfig,
    LinearDistillationConfig,
    LinearKTOLossConfig,
    LinearPolicyLossConfig,
    LinearPreferenceLossConfig,
    LinearSoftCrossEntropyConfig,
    LossConfig,
    LossFromFactoryConfig,
    MaskedCrossEntropyConfig,
    MTPLossConfig,
    MultiTokenPredictionConfig,
    PolicyLossConfig,
    PreferenceLossConfig,
    TEParallelCEConfig,
    build_loss_config,
    build_loss_module,
    register_loss_config,
)
from compiled_loss.distributed.vocab_shard import VocabShard  # noqa: E402
from compiled_loss.engine import flops as _flops  # noqa: E402
from compiled_loss.engine.math.statistics import TokenStatistics, TopK  # noqa: E402
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
from compiled_loss.functional.ids import pad_ids  # noqa: E402
from compiled_loss.functional.kto import kto_loss, linear_kto_loss  # noqa: E402
from compiled_loss.functional.kto_evaluation import KTOLoss, KTOMetrics  # noqa: E402
from compiled_loss.functional.multi_token import (  # noqa: E402
    MultiTokenLosses,
    multi_token_losses,
    multi_token_prediction,
    multi_token_targets,
)
from compiled_loss.functional.policy import linear_policy_loss, policy_loss  # noqa: E402
from compiled_loss.functional.policy_evaluation import PolicyLoss, PolicyMetrics  # noqa: E402
from compiled_loss.functional.preference import linear_preference_loss, preference_loss  # noqa: E402
from compiled_loss.functional.preference_evaluation import PreferenceLoss, PreferenceMetrics  # noqa: E402
from compiled_loss.functional.reward import RewardLoss, RewardMetrics, bradley_terry_loss  # noqa: E402
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
    "BradleyTerryLossConfig",
    "ChunkedCEConfig",
    "ChunkedCrossEntropy",
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
    "KTOLoss",
    "KTOLossConfig",
    "KTOMetrics",
    "LinearCrossEntropyConfig",
    "LinearDistillationConfig",
    "LinearKTOLossConfig",
    "LinearPolicyLossConfig",
    "LinearPreferenceLossConfig",
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
    "PolicyLossConfig",
    "PolicyMetrics",
    "PreferenceLoss",
    "PreferenceLossConfig",
    "PreferenceMetrics",
    "RewardLoss",
    "RewardMetrics",
    "TEParallelCEConfig",
    "TEParallelCrossEntropy",
    "TokenStatistics",
    "TopK",
    "VocabShard",
    "bradley_terry_loss",
    "build_loss_config",
    "build_loss_module",
    "calculate_loss",
    "calculate_mtp_loss",
    "calculate_mtp_losses",
    "cross_entropy",
    "distillation",
    "distillation_with_statistics",
    "kto_loss",
    "linear_cross_entropy",
    "linear_cross_entropy_with_statistics",
    "linear_distillation",
    "linear_distillation_with_statistics",
    "linear_kto_loss",
    "linear_logits_loss",
    "linear_policy_loss",
    "linear_preference_loss",
    "linear_soft_cross_entropy",
    "linear_token_loss",
    "linear_token_statistics",
    "listmle_loss",
    "make_token_weights",
    "masked_cross_entropy",
    "masked_soft_cross_entropy",
    "multi_token_losses",
    "multi_token_prediction",
    "multi_token_targets",
    "pad_ids",
    "plan",
    "policy_loss",
    "preference_loss",
    "prepare_lm_weight",
    "register_loss_config",
    "token_statistics",
]
