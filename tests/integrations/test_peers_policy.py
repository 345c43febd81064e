"""Policy losses beside those of TRL, verl and Liger, by the code of these packages themselves.

They are not installed for the suite. In an environment of its own: pip install '.[peers]' pytest expecttest, and run
this file alone; with -s it prints the differences that docs/reinforcement.md shows. verl 0.9.1 asks for another
transformers than TRL does: pip install ray tensordict omegaconf codetiming orjson, pip install --no-deps verl==0.9.1.

The functions get the same log-probabilities in fp64. Where a model belongs to the comparison, it is a tiny one with
random weights.
"""

import re
import runpy
from pathlib import Path

import pytest
import torch
from policy_peers import ROUNDED, B, S, agree, made, of_liger, of_trl, of_verl, ours, trainer_of, weighted

from compiled_loss import Chunking, linear_policy_loss, make_token_weights, policy_loss

pytest.importorskip("trl", reason="the extra 'peers' is not installed")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of what these packages import
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


@pytest.fixture
def batch():
    return made()


# TRL


CLIP = {"clip_low": 0.2, "clip_high": 0.28}
OF_BATCH = {"num_tokens": 25}  # TRL's 100 tokens of four generation steps, one of which is accumulated
TRL = {  # (TRL's options, our weights, their counts, our options)
    "grpo": ({}, "sequence_mean", {}, CLIP),
    "bnpo": ({}, "token_mean", {}, CLIP),
    "dr_grpo": ({}, "fixed_length", {"length": 12}, CLIP),
    "dapo": ({}, "token_mean", OF_BATCH, CLIP),
    "cispo": ({"epsilon_high": 1.2}, "token_mean", OF_BATCH, {"kind": "cispo", "clip_high": 1.2}),
    "sapo": ({}, "sequence_mean", {}, {"kind": "sapo"}),
    "luspo": ({}, "sequence_sum", {}, CLIP),
}


@pytest.mark.parametrize("loss_type", TRL)
def test_trl(batch, loss_type):
    options, weights, counts, mine = TRL[loss_type]
    mine = ours(batch, weights, counts=counts, **mine)
    agree(f"TRL {loss_type}", mine, of_trl(batch, loss_type, **options), [batch.logprob])


@pytest.mark.parametrize("loss_type", ["grpo", "luspo"])
def test_trl_by_sequences(batch, loss_type):
    """TRL's gradient is of a sequence's mean, ours a token's own: the same where its tokens weigh the same."""
    mine = ours(batch, TRL[loss_type][1], importance="sequence", **CLIP)
    theirs = of_trl(batch, loss_type, importance_sampling_level="sequence")
    agree(f"TRL {loss_type}, sequences", mine, theirs, [batch.logprob])


def test_trl_gmpo(batch):
    kind = pytest.importorskip("trl.experimental.gmpo").GMPOTrainer
    theirs = of_trl(batch, kind=kind, epsilon_low=0.3, epsilon_high=0.2, beta=0.04)
    more = {"reference_logprob": batch.reference, "kl_coefficient": 0.04, "clip_low": 0.3, "clip_high": 0.2}
    mine = ours(batch, "sequence_mean", kind="gmpo", importance="sequence", **more)
    agree("TRL GMPO", mine, theirs, [batch.logprob])


TERMS = {  # (TRL's options, ours)
    "delta": ({"delta": 1.5}, {"dual_clip": 1.5}),
    "kl": ({"beta": 0.1}, {"kl_coefficient": 0.1}),
    "vllm": ({"use_vllm": True, "beta": 0.1}, {"kl_coefficient": 0.1, "correction": True}),
    "entropy": ({"entropy_coef": 0.05}, {"entropy_coefficient": 0.05}),
}


@pytest.mark.parametrize("name", TERMS)
def test_trl_terms(batch, name):
    options, mine = TERMS[name]
    mine = dict(mine, correction=batch.correction) if "correction" in mine else dict(mine)
    mine |= {"reference_logprob": batch.reference} if "kl_coefficient" in mine else {}
    leaves = [batch.logprob]
    if name == "entropy":  # a mean over tokens, whatever the policy's normaliser is
        own = make_token_weights(batch.mask, "token_mean")
        mine |= {"entropy": batch.entropy, "entropy_weights": own}
        leaves.append(batch.entropy)
    agree(f"TRL {name}", ours(batch, "sequence_mean", **CLIP, **mine), of_trl(batch, **options), leaves)


def test_trl_weights_of_its_own(batch):
    """VESPO's weights, the off-policy mask and the mask of high entropies are numbers a token: `correction`."""
    kind = pytest.importorskip("trl").GRPOTrainer
    logprob, mask, advantages = batch.logprob.detach(), batch.mask.double(), batch.advantages
    phi = kind.get_gamma_weights(advantages, logprob - batch.old, mask, batch.correction).expand(B, S)
    mine = ours(batch, "token_mean", counts=OF_BATCH, kind="reinforce", correction=phi)
    agree("TRL vespo", mine, of_trl(batch, "vespo"), [batch.logprob])
    kept = kind.get_off_policy_mask(advantages, logprob, batch.old, mask, 0.05)
    assert 0 < kept.sum() < B
    mine = ours(batch, "sequence_mean", correction=kept.expand(B, S), **CLIP)
    agree("TRL off-policy mask", mine, of_trl(batch, off_policy_mask_threshold=0.05), [batch.logprob])
    entropy = batch.entropy.detach()
    sure = entropy < torch.quantile(entropy[batch.mask].float(), 0.8)
    mine = ours(batch, "sequence_mean", correction=(~sure).double(), **CLIP)
    agree("TRL high entropies", mine, of_trl(batch, top_entropy_quantile=0.2), [batch.logprob])


def test_trl_counts_answers_without_a_token(batch):
    """1.16's means are over all rows of the batch; ours leave out those that have no token."""
    batch.mask[2] = False
    theirs = of_trl(batch)
    agree(
        "TRL grpo, an empty answer",
        ours(batch, "sequence_mean", counts={"num_sequences": B}, **CLIP),
        theirs,
        [batch.logprob],
    )
    torch.testing.assert_close(ours(batch, "sequence_mean", **CLIP) * (B - 1) / B, theirs)


@pytest.mark.parametrize("strategy", ["tokens", "vocab"])
def test_trl_with_a_model(batch, strategy):
    """From a model's hidden states, at a sampler's temperature: TRL's own head beside ours, in fp32.

    A logit's rounding is one of the ratio, its exponential; eight are allowed for the layers that sum the gradients.
    """
    trl, transformers = pytest.importorskip("trl"), pytest.importorskip("transformers")
    from trl.trainer.utils import add_fused_lm_head

    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 32}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=61, hidden_size=16, **sizes)).train()
    with torch.no_grad():
        model.lm_head.weight.mul_(40)  # or every token would be as likely as the next
    add_fused_lm_head(model, temperature=0.7, outputs=("log_probs", "entropy"))
    ids, mask = torch.randint(0, 61, (B, 3 + S)), torch.cat([torch.ones(B, 3, dtype=torch.bool), batch.mask], 1)
    hidden = model.model(input_ids=ids, attention_mask=mask.long()).last_hidden_state[:, 2:-1]
    head = model.lm_head.weight
    with torch.no_grad():
        z = hidden.double() @ head.double().T / 0.7
        logprob = z.log_softmax(-1).gather(-1, ids[:, 3:, None]).squeeze(-1)
    old = (logprob + batch.old - batch.logprob.detach()).float()
    more = {"kl_coefficient": 0.1, "entropy_coefficient": 0.05, "reference_logprob": (old - 0.1)}
    mine = linear_policy_loss(
        hidden,
        head,
        ids[:, 3:],
        old,
        batch.advantages.float(),
        temperature=0.7,
        entropy_weights=make_token_weights(batch.mask, "token_mean"),
        chunking=Chunking(strategy=strategy, chunk_size=7),
        **weighted(batch, "sequence_mean"),
        **CLIP,
        **more,
    ).loss
    trainer = trainer_of(trl.GRPOTrainer, loss_type="grpo", beta=0.1, entropy_coef=0.05)
    inputs = {
        "prompt_ids": ids[:, :3],
        "prompt_mask": mask[:, :3].long(),
        "completion_ids": ids[:, 3:],
        "completion_mask": batch.mask.long(),
        "advantages": batch.advantages[:, 0].float(),
        "old_per_token_logps": old,
        "ref_per_token_logps": more["reference_logprob"],
    }
    theirs = trainer._compute_loss(model, inputs)
    leaves = [p for p in model.parameters() if p.requires_grad]
    agree(f"TRL with a model, {strategy}", mine, theirs, leaves, tolerance=8 * 2**-24 * z.abs().max().item())


# verl

MODES = {  # (our weights, their counts)
    "token-mean": ("token_mean", {}),
    "token-sum": ("sum", {}),
    "seq-mean-token-sum": ("sequence_sum", {}),
    "seq-mean-token-sum-norm": ("fixed_length", {"length": S}),
    "seq-mean-token-mean": ("sequence_mean", {}),
}


@pytest.mark.parametrize("mode", MODES)
def test_verl_normalisations(batch, mode):
    """With its dual clip, and a sampler's ratios; of the batch, and of counts over ranks and accumulated steps."""
    batch.mask[2] = False  # verl leaves out what has no token, as we do
    weights, counts = MODES[mode]
    more = {"dual_clip": 3.0, "correction": batch.correction, **CLIP}
    theirs = of_verl(batch, "vanilla", mode, correction=batch.correction)
    agree(f"verl vanilla, {mode}", ours(batch, weights, counts=counts, **more), theirs, [batch.logprob])
    whole = {"batch_num_tokens": 100} if mode == "token-mean" else {"global_batch_size": 17}
    if mode != "token-sum":
        counts = counts | ({"num_tokens": 100} if mode == "token-mean" else {"num_sequences": 17})
    theirs = of_verl(batch, "vanilla", mode, correction=batch.correction, global_batch_info=whole)
    agree(f"verl vanilla, {mode}, of all", ours(batch, weights, counts=counts, **more), theirs, [batch.logprob])


VERL = {  # (verl's options, our weights, ours)
    "gspo": ({"mode": "seq-mean-token-mean"}, "sequence_mean", {"importance": "sequence", **CLIP}),
    "sapo": ({"mode": "seq-mean-token-mean"}, "sequence_mean", {"kind": "sapo"}),
    "gpg": ({}, "token_mean", {"kind": "reinforce"}),
    "cispo": ({}, "token_mean", {"kind": "cispo_two_sided", **CLIP}),
    "geo_mean": ({}, "sequence_mean", {"kind": "gmpo", "importance": "sequence", **CLIP}),
}


@pytest.mark.parametrize("name", VERL)
def test_verl(batch, name):
    options, weights, mine = VERL[name]
    agree(f"verl {name}", ours(batch, weights, **mine), of_verl(batch, name, **options), [batch.logprob])


KLS = {"k1": "kl", "k2": "mse", "k3": "low_var_kl", "k1_straight_through": "k1+", "k3_straight_through": "k3+"}


@pytest.mark.parametrize("kl", KLS)
def test_verl_kl(batch, kl):
    """The estimate alone: the loss of advantages that are 0."""
    core = pytest.importorskip("verl.trainer.ppo.core_algos")
    options = {"reference_logprob": batch.reference, "kl": kl, "kl_coefficient": 1.0, **weighted(batch, "token_mean")}
    mine = policy_loss(batch.logprob, batch.old, torch.zeros_like(batch.advantages), **options).loss
    theirs = core.agg_loss(core.kl_penalty(batch.logprob, batch.reference, KLS[kl]), batch.mask, "token-mean")
    agree(f"verl {KLS[kl]}", mine, theirs, [batch.logprob])


def test_verl_bounds(batch):
    """0.9.1's own: `kl_penalty_forward` bounds k3 by 10, and GSPO the log of a sequence's ratio by 10."""
    core = pytest.importorskip("verl.trainer.ppo.core_algos")
    logprob = torch.tensor([-4.0], dtype=torch.float64, requires_grad=True)
    theirs = core.kl_penalty(logprob, logprob.detach() + 3, "k3")  # exp(3) - 1 - 3 = 16.1
    assert theirs.item() == 10 and torch.autograd.grad(theirs, logprob)[0] == 0
    options = {"reference_logprob": logprob.detach() + 3, "kl_coefficient": 1.0}
    found = policy_loss(logprob, logprob.detach(), torch.zeros_like(logprob), **options).loss
    torch.testing.assert_close(found, torch.tensor(3.0, dtype=torch.float64).exp() - 4)
    batch.old, batch.advantages = batch.logprob.detach() - 12, -torch.ones(B, 1, dtype=torch.float64)
    theirs = of_verl(batch, "gspo", "seq-mean-token-mean").detach()
    torch.testing.assert_close(theirs, torch.tensor(10.0, dtype=torch.float64).exp())
    found = ours(batch, "sequence_mean", importance="sequence", **CLIP).detach()
    torch.testing.assert_close(found, torch.tensor(12.0, dtype=torch.float64).exp(), rtol=ROUNDED, atol=0)


# Liger


@pytest.mark.parametrize("loss_type", [name for name in TRL if name != "luspo"])
def test_liger(batch, loss_type):
    options, weights, counts, mine = TRL[loss_type]
    counts = counts if loss_type == "dr_grpo" else {}  # of the batch
    mine = {"reference_logprob": batch.reference, "kl_coefficient": 0.1, **mine}
    theirs = of_liger(batch, loss_type, **options)
    agree(f"Liger {loss_type}", ours(batch, weights, counts=counts, **mine), theirs, [batch.logprob])


def test_liger_by_sequences(batch):
    mine = ours(batch, "sequence_mean", importance="sequence", dual_clip=1.5, **CLIP)
    theirs = of_liger(batch, "grpo", importance_sampling_level="sequence", beta=0.0, delta=1.5)
    agree("Liger grpo, sequences", mine, theirs, [batch.logprob])
    mine = ours(batch, "sequence_sum", importance="sequence", **CLIP)
    theirs = of_liger(batch, "luspo", importance_sampling_level="sequence", beta=0.0)
    agree("Liger luspo, sequences", mine, theirs, [batch.logprob])


def test_liger_luspo_of_tokens_is_another(batch):
    """0.8.5 weighs also tokens that are masked, each by its answer's length, and divides by B S: not TRL's."""
    theirs = of_liger(batch, "luspo", beta=0.0)
    lengths = batch.mask.sum(1, keepdim=True).double()
    every = torch.ones_like(batch.mask)
    options = {"mask": every, "token_weights": (lengths / (B * S)).expand(B, S), **CLIP}
    agree(
        "Liger luspo", policy_loss(batch.logprob, batch.old, batch.advantages, **options).loss, theirs, [batch.logprob]
    )
    assert abs(theirs - of_trl(batch, "luspo")) > 0.1 * abs(theirs)


@pytest.mark.parametrize("strategy", ["tokens", "vocab"])
def test_liger_with_a_head(batch, strategy):
    """Its fused loss beside ours: hidden states and a head in fp32."""
    liger = pytest.importorskip("liger_kernel.chunked_loss.grpo_loss")
    hidden, head = torch.randn(B, S, 16, requires_grad=True), torch.randn(61, 16, requires_grad=True)
    labels = torch.randint(0, 61, (B, S))
    with torch.no_grad():
        z = hidden @ head.T
        logprob = z.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    old = logprob + (batch.old - batch.logprob.detach()).float()
    advantages, reference = batch.advantages.float(), old - 0.1
    fused = liger.LigerFusedLinearGRPOLoss(beta=0.1, compiled=False, use_ref_model=True, epsilon_high=0.28)
    flat = (hidden, head, labels, batch.mask.float(), advantages[:, 0])
    theirs = fused(*flat, ref_per_token_logps=reference, old_per_token_logps=old)[0]
    mine = linear_policy_loss(
        hidden,
        head,
        labels,
        old,
        advantages,
        reference_logprob=reference,
        kl_coefficient=0.1,
        chunking=Chunking(strategy=strategy, chunk_size=7),
        **weighted(batch, "token_mean"),
        **CLIP,
    ).loss
    agree(f"Liger with a head, {strategy}", mine, theirs, [hidden, head], tolerance=8 * 2**-24 * z.abs().max().item())


# Losses of docs/your-own-loss.md


@pytest.fixture(scope="module")
def guide():
    """The names that the blocks of the guide define."""
    text = (Path(__file__).parents[2] / "docs" / "your-own-loss.md").read_text(encoding="utf-8")
    names = {}
    exec("".join(re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)), names)
    return names


def own(batch, losses, normalisation):
    return (losses * make_token_weights(batch.mask, normalisation)).sum()


TOKEN_LOSSES = {  # (ours, our numbers, verl's options)
    "dro": ("dro", (0.3,), {"policy": {"dro_beta": 0.3}}),
    "dppo_tv": ("dppo_tv", (0.02, 0.03, 1.3), {"clip_ratio_low": 0.02, "clip_ratio_high": 0.03, "clip_ratio_c": 1.3}),
}


@pytest.mark.parametrize("name", TOKEN_LOSSES)
def test_guide_beside_verl(batch, guide, name):
    function, numbers, options = TOKEN_LOSSES[name]
    losses = guide[function](batch, batch.old, batch.advantages, *numbers)
    agree(f"verl {name}", own(batch, losses, "token_mean"), of_verl(batch, name, **options), [batch.logprob])


def test_covariances_beside_verl(batch, guide):
    """clip-cov draws among the tokens in its range, here all of them; verl leaves out those that are clipped."""
    logprob, advantages = batch.logprob.detach(), batch.advantages.expand(B, S)
    covariance = guide["covariances"](logprob, advantages, batch.mask)
    largest = covariance >= covariance.flatten().topk(5).values[-1]
    losses = guide["unclipped_with_kl"](batch, batch.old, advantages, 0.7 * largest)
    theirs = of_verl(batch, "kl_cov", policy={"kl_cov_ratio": 0.2, "ppo_kl_coef": 0.7})  # 5 of 26 tokens
    agree("verl kl_cov", own(batch, losses, "token_mean"), theirs, [batch.logprob])
    ratio = (logprob - batch.old).exp()
    clipped = ((ratio > 1.28) & (advantages > 0)) | ((ratio < 0.8) & (advantages < 0))
    dropped = (covariance > 0.2) & (covariance < 5.0) & ~clipped
    assert dropped.sum() > 1
    mine = ours(batch, "token_mean", correction=(~dropped).double(), **CLIP)
    policy = {"clip_cov_ratio": 1.0, "clip_cov_lb": 0.2, "clip_cov_ub": 5.0}
    agree("verl clip_cov", mine, of_verl(batch, "clip_cov", policy=policy), [batch.logprob])


def test_values_beside_verl(batch, guide):
    core = pytest.importorskip("verl.trainer.ppo.core_algos")
    value, old = batch.logprob, batch.old
    theirs = core.compute_value_loss(value, batch.reference, old, batch.mask, cliprange_value=0.1)[0]
    losses = guide["value_losses"](value, old, batch.reference, 0.1)
    agree("verl value", own(batch, losses, "token_mean"), theirs, [value])


def test_guide_beside_trl(batch, guide):
    loss = guide["clipped_with_unbiased_kl"]
    losses = loss(batch, batch.old, batch.reference, batch.advantages, 0.2, 0.28, 0.1)
    theirs = of_trl(batch, beta=0.1, use_bias_correction_kl=True)
    agree("TRL unbiased KL", own(batch, losses, "sequence_mean"), theirs, [batch.logprob])
    kind = pytest.importorskip("trl").GRPOTrainer
    arguments = (batch.logprob.detach(), batch.old, batch.advantages, batch.mask)
    theirs = kind.get_gamma_weights(batch.advantages, arguments[0] - batch.old, batch.mask, None)
    torch.testing.assert_close(guide["vespo_weights"](*arguments), theirs, rtol=1e-12, atol=0)


def test_optimal_token_baseline_beside_verl():
    """Of examples/recipes.py, with a reward at the end of each of four answers."""
    core = pytest.importorskip("verl.trainer.ppo.core_algos")
    recipes = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "recipes.py"))
    hidden, weight = torch.randn(4, S, 6, dtype=torch.float64), torch.randn(37, 6, dtype=torch.float64)
    hidden.requires_grad_()
    lengths, rewards = torch.tensor([9, 4, 7, 5]), torch.rand(4, dtype=torch.float64)
    mask = torch.arange(S) < lengths[:, None]
    labels = torch.where(mask, torch.randint(0, 37, (4, S)), -100)
    log_p = (hidden @ weight.T).log_softmax(-1)
    logprob = log_p.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    of_tokens = torch.zeros(4, S, dtype=torch.float64).scatter(1, lengths[:, None] - 1, rewards[:, None])
    numbers = (of_tokens, mask.double(), [0] * 4, logprob, log_p.exp().square().sum(-1))
    advantages = core.compute_optimal_token_baseline_advantage(*numbers, handle_zero_tail=False)[0]
    theirs = -(advantages * logprob)[mask].mean()
    mine = recipes["optimal_token_baseline"](hidden, weight, labels, rewards)
    agree("verl optimal token baseline", mine, theirs, [hidden])
