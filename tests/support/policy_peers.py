"""Policy losses of TRL, verl and Liger, by their own code, of one batch of log-probabilities in fp64.

A trainer of TRL is made without its constructor and holds what its method reads.
"""

import collections
import contextlib
import types

import pytest
import torch

from compiled_loss import make_token_weights, policy_loss

B, S = 5, 9
ROUNDED = 5 * 2**-24  # token weights are fp32, of at most three roundings; a divisor of verl has 1e-8 added to it


class Batch(types.SimpleNamespace):
    """Log-probabilities that exist, [B, S] in fp64."""


def made():
    """Half of its ratios are out of bounds."""
    random = torch.Generator().manual_seed(4)
    normal = [torch.randn(B, S, generator=random, dtype=torch.float64) for _ in range(4)]
    logprob = -1.0 - normal[0].abs()
    return Batch(
        logprob=logprob.requires_grad_(),
        old=logprob.detach() + 0.4 * normal[1],
        reference=logprob.detach() + 0.4 * normal[2],
        entropy=(1.0 + normal[3].abs()).requires_grad_(),
        correction=torch.rand(B, S, generator=random, dtype=torch.float64) + 0.5,
        advantages=torch.tensor([[1.3], [-0.7], [0.4], [-1.9], [0.0]], dtype=torch.float64),
        mask=torch.arange(S) < torch.tensor([[9], [4], [1], [7], [5]]),
    )


def agree(name, ours, theirs, leaves, tolerance=ROUNDED):
    """Values and gradients, relative to the largest of theirs."""
    pairs = [(ours.detach(), theirs.detach())]
    pairs += zip(*(torch.autograd.grad(loss, leaves) for loss in (ours, theirs)), strict=True)
    assert all(their.abs().max() > 1e-3 for _, their in pairs)
    errors = [((our - their).abs().max() / their.abs().max()).item() for our, their in pairs]
    print(f"\n{name}: loss {errors[0]:.1e}, gradients {max(errors[1:]):.1e}")
    assert max(errors) <= tolerance


def weighted(batch, normalisation, **counts):
    return {"mask": batch.mask, "token_weights": make_token_weights(batch.mask, normalisation, **counts)}


def ours(batch, normalisation, *, counts=None, **options):
    options = weighted(batch, normalisation, **(counts or {})) | options
    return policy_loss(batch.logprob, batch.old, batch.advantages, **options).loss


def trainer_of(kind, **options):
    """A trainer with what `_compute_loss` reads: of its config the defaults, of itself what is said."""
    trl = pytest.importorskip("trl")
    options = {
        "aux_loss_enabled": False,
        "beta": 0.0,
        "current_gradient_accumulation_steps": 1,
        "entropy_coef": 0.0,
        "epsilon_high": 0.28,
        "epsilon_low": 0.2,
        "importance_sampling_level": "token",
        "max_completion_length": 12,
        "off_policy_mask_threshold": None,
        "steps_per_generation": 4,
        "top_entropy_quantile": 1.0,
        "use_bias_correction_kl": False,
        "use_adaptive_entropy": False,
        "use_vllm": False,
        "vllm_importance_sampling_correction": True,
    } | options
    trainer = object.__new__(kind)
    vars(trainer).update(options)
    defaults = {name: field.default for name, field in trl.GRPOConfig.__dataclass_fields__.items()}
    trainer.args = types.SimpleNamespace(**(defaults | options))
    trainer.accelerator = types.SimpleNamespace(
        num_processes=1,
        is_main_process=True,
        sync_gradients=False,
        gather=lambda value: value,
        reduce=lambda value, reduction: value,
        pad_across_processes=lambda value, **_: value,
        autocast=contextlib.nullcontext,
    )
    trainer.model = types.SimpleNamespace(training=True)
    trainer._metrics = collections.defaultdict(lambda: collections.defaultdict(list))
    trainer._entropy_bonus_enabled = trainer.entropy_coef != 0
    return trainer


def of_trl(batch, loss_type="grpo", *, kind=None, **changed):
    """The loss by TRL, whose model is the log-probabilities of the batch."""
    trl = pytest.importorskip("trl")
    trainer = trainer_of(kind or trl.GRPOTrainer, loss_type=loss_type, **changed)
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (batch.logprob, batch.entropy, None)
    ids = torch.zeros(B, S, dtype=torch.int64)
    inputs = {
        "prompt_ids": ids[:, :2],
        "prompt_mask": ids[:, :2],
        "completion_ids": ids,
        "completion_mask": batch.mask.long(),
        "advantages": batch.advantages[:, 0],
        "old_per_token_logps": batch.old,
        "ref_per_token_logps": batch.reference,
        "importance_sampling_ratio": batch.correction,
        "num_items_in_batch": torch.tensor(100.0),
    }
    return trainer._compute_loss(None, inputs)


def verl_config(**options):
    pytest.importorskip("verl.trainer.ppo.core_algos")
    from verl.workers.config import ActorConfig, PolicyLossConfig

    policy = PolicyLossConfig(**options.pop("policy", {}))
    options = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28} | options
    return ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        use_dynamic_bsz=True,
        policy_loss=policy,
        **options,
    )


def of_verl(batch, name, mode="token-mean", *, correction=None, **options):
    config = verl_config(**options)
    from verl.trainer.ppo.core_algos import get_policy_loss_fn

    advantages = batch.advantages.expand(B, S)
    arguments = (batch.old, batch.logprob, advantages, batch.mask.double())
    return get_policy_loss_fn(name)(*arguments, loss_agg_mode=mode, config=config, rollout_is_weights=correction)[0]


def of_liger(batch, loss_type, **options):
    """The formula of its chunked loss, of log-probabilities; pure torch."""
    liger = pytest.importorskip("liger_kernel.chunked_loss.grpo_loss")
    mask = batch.mask.double()
    options = {"epsilon_low": 0.2, "epsilon_high": 0.28, "max_completion_length": 12, "beta": 0.1} | options
    more = {"ref_per_token_logps": batch.reference, "old_per_token_logps": batch.old, "full_attention_mask": mask}
    formula = liger.LigerFusedLinearGRPOFunction.ppo_loss_fn
    return formula(batch.logprob, mask, batch.advantages[:, 0], loss_type=loss_type, **more, **options)[0]
