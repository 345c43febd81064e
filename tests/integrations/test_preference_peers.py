"""Preference losses beside those of TRL and of Liger, by the code of these packages themselves.

They are not installed for the suite. pip install '.[peers]' and run this file alone.

The methods of TRL's trainers that compute a loss are called on a tiny model with random weights; a stand-in for the
trainer holds the attributes that they read. Liger's functions are called on hidden states. Where both run in fp32,
values differ by the roundings of sums over a few answers.
"""

import collections
import types

import pytest
import torch

from compiled_loss import bradley_terry_loss, linear_kto_loss, linear_preference_loss

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # transformers', of TRL
EXPERIMENTAL = pytest.mark.filterwarnings("ignore::UserWarning:trl")  # as its experimental modules are imported
TOLERANCE = {"rtol": 2e-5, "atol": 2e-6}  # 8 answers of some 40 nats: 2^-24 of each sum, times the slope of a loss
P, S, VOCAB, WIDTH = 4, 12, 61, 16
PROMPT = 4


@pytest.fixture(scope="module")
def trl():
    return pytest.importorskip("trl")


@pytest.fixture(scope="module")
def llama():
    return pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def models(trl, llama):
    """A policy and its reference, with the head that TRL's trainers give them."""
    from trl.trainer.utils import add_fused_lm_head

    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 32}
    config = llama.LlamaConfig(vocab_size=VOCAB, hidden_size=WIDTH, initializer_range=0.3, **sizes)
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = llama.LlamaForCausalLM(config)
        add_fused_lm_head(model, outputs=("entropy", "mean_logits", "is_top1"))
        found.append(model)
    return found


def batch(rows=2 * P):
    """Tokens, and which of them are of an answer: prompts come first, padding last."""
    random = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, VOCAB, (rows, S), generator=random)
    lengths = torch.randint(PROMPT + 1, S + 1, (rows, 1), generator=random)
    places = torch.arange(S)
    there = places < lengths
    return tokens, there.long(), ((places >= PROMPT) & there).long()


def hidden_of(model, tokens, there):
    return model.model(input_ids=tokens, attention_mask=there).last_hidden_state


def trainer(**attributes):
    """What a trainer's methods read of it."""
    device = torch.device("cpu")
    accelerator = types.SimpleNamespace(
        device=device, gather_for_metrics=lambda v: v, gather=lambda v: v, unwrap_model=lambda v: v
    )
    found = types.SimpleNamespace(
        accelerator=accelerator,
        _metrics=collections.defaultdict(lambda: collections.defaultdict(list)),
        args=types.SimpleNamespace(gradient_checkpointing_kwargs=None, discopop_tau=0.05),
        aux_loss_enabled=False,
        _total_train_tokens=0,
        _tp_size=1,
        ld_alpha=None,
        use_weighting=False,
        precompute_ref_logps=False,
        label_smoothing=0.0,
        beta=0.1,
    )
    vars(found).update(attributes)
    return found


def assert_alike(mine, theirs, leaves):
    """Values, and gradients relative to their norms."""
    torch.testing.assert_close(mine.detach(), theirs.detach(), **TOLERANCE)
    pairs = zip(torch.autograd.grad(mine, leaves), torch.autograd.grad(theirs, leaves), strict=True)
    for ours, others in pairs:
        assert (ours - others).norm() <= 1e-4 * others.norm() + 1e-7


SMOOTHED = {"label_smoothing": 0.1}
DPO = {  # what TRL calls it and its options, what it is here
    "sigmoid": ({}, {}),
    "robust": (SMOOTHED, {"kind": "robust", **SMOOTHED}),
    "hinge": ({}, {"kind": "hinge"}),
    "ipo": ({}, {"kind": "ipo", "length_normalised": True}),
    "exo_pair": (SMOOTHED, {"kind": "exo", **SMOOTHED}),
    "nca_pair": ({}, {"kind": "nca"}),
    "bco_pair": ({}, {"kind": "bco"}),
    "sppo_hard": ({}, {"kind": "sppo"}),
    "apo_zero": ({}, {"kind": "apo_zero"}),
    "apo_down": ({}, {"kind": "apo_down"}),
    "sigmoid_norm": ({}, {"length_normalised": True}),
}
DIVERGENCES = {
    "reverse_kl": "reverse_kl",
    "forward_kl": "forward_kl",
    "js_divergence": "js",
    "alpha_divergence": "alpha",
}


def dpo(trl, models, name, **attributes):
    policy, reference = models
    tokens, there, answers = batch()
    settings = {"loss_types": [name], "loss_weights": [1.0], "f_divergence_type": "reverse_kl"}
    settings |= {"model": policy, "ref_model": reference, **attributes}
    me = trainer(**settings)
    inputs = {"input_ids": tokens, "attention_mask": there, "completion_mask": answers}
    return trl.DPOTrainer._compute_loss(me, policy, inputs, False), me._metrics["train"]


def ours(models, **options):
    policy, reference = models
    tokens, there, answers = batch()
    labels = tokens.masked_fill(answers == 0, -100)
    return linear_preference_loss(
        hidden_of(policy, tokens, there),
        policy.lm_head.weight,
        labels,
        shift=1,
        reference_hidden=hidden_of(reference, tokens, there),
        reference_weight=reference.lm_head.weight,
        **options,
    )


@pytest.mark.parametrize("name", DPO)
def test_dpo_of_trl(trl, models, name):
    theirs, options = DPO[name]
    policy, _ = models
    loss, logged = dpo(trl, models, name, **theirs)
    found = ours(models, **options)
    assert_alike(found.loss, loss, [policy.lm_head.weight, policy.model.layers[0].mlp.up_proj.weight])
    if not options.get("length_normalised"):  # whose rewards TRL does not normalise
        for mine, name_ in (
            ("chosen", "rewards/chosen"),
            ("rejected", "rewards/rejected"),
            ("margin", "rewards/margins"),
        ):
            value = getattr(found.metrics, f"reward_{mine}").item()
            assert value == pytest.approx(logged[name_][0], rel=1e-4, abs=1e-5)
        assert found.metrics.accuracy.item() == pytest.approx(logged["rewards/accuracies"][0])
    assert found.metrics.logprob_chosen.item() == pytest.approx(logged["logps/chosen"][0], rel=1e-5)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_divergences_of_trl(trl, models, divergence):
    policy, _ = models
    loss, _ = dpo(trl, models, "sigmoid", f_divergence_type=divergence, f_alpha_divergence_coef=0.9)
    found = ours(models, f_divergence=DIVERGENCES[divergence], alpha=0.9)
    assert_alike(found.loss, loss, [policy.lm_head.weight])


def test_rpo_of_trl(trl, models):
    """Two loss types, of which one is the chosen answers' own likelihood."""
    policy, _ = models
    loss, _ = dpo(trl, models, "sigmoid", loss_types=["sigmoid", "sft"], loss_weights=[1.0, 0.7])
    assert_alike(ours(models, sft_coefficient=0.7).loss, loss, [policy.lm_head.weight])


def kto_inputs(rows=6):
    tokens, there, answers = batch(rows)
    rolled = tokens.clone()
    rolled[:, PROMPT:] = tokens.roll(1, 0)[:, PROMPT:]
    there_, answers_ = there.roll(1, 0), answers.roll(1, 0)
    return tokens, there, answers, rolled, there_, answers_, torch.arange(rows) % 3 > 0


@pytest.mark.parametrize("kind", ["kto", "apo_zero_unpaired"])
def test_kto_of_trl(trl, models, kind):
    policy, reference = models
    tokens, there, answers, rolled, there_, answers_, desirable = kto_inputs()
    inputs = {
        "input_ids": tokens,
        "attention_mask": there,
        "completion_mask": answers,
        "KL_input_ids": rolled,
        "KL_attention_mask": there_,
        "KL_completion_mask": answers_,
        "label": desirable,
    }
    me = trainer(loss_type=kind, calculate_KL=kind == "kto", desirable_weight=1.3, undesirable_weight=0.8)
    vars(me).update(model=policy, ref_model=reference, _peft_has_been_casted_to_bf16=False)
    me._compute_kl_logps = lambda model, given: trl.KTOTrainer._compute_kl_logps(me, model, given)
    loss = trl.KTOTrainer._compute_loss(me, policy, inputs, False)

    def sums(model):
        labels = rolled.masked_fill(answers_ == 0, -100)
        logprob = model.lm_head(hidden_of(model, rolled, there_))[:, :-1].log_softmax(-1)
        picked = logprob.gather(-1, labels[:, 1:].clamp(min=0).unsqueeze(-1)).squeeze(-1)
        return (picked * (labels[:, 1:] >= 0)).sum(-1).detach()

    found = linear_kto_loss(
        hidden_of(policy, tokens, there),
        policy.lm_head.weight,
        tokens.masked_fill(answers == 0, -100),
        desirable,
        shift=1,
        reference_hidden=hidden_of(reference, tokens, there),
        reference_weight=reference.lm_head.weight,
        kl=sums(policy) - sums(reference) if kind == "kto" else None,
        kind=kind,
        desirable_weight=1.3,
        undesirable_weight=0.8,
    )
    assert_alike(found.loss, loss, [policy.lm_head.weight])


CPO = {
    "sigmoid": ({}, {"sft_coefficient": 1.0}),
    "hinge": ({}, {"kind": "hinge", "sft_coefficient": 1.0}),
    "ipo": ({}, {"kind": "ipo", "length_normalised": True, "sft_coefficient": 1.0}),
    "simpo": (
        {"cpo_alpha": 0.0, "beta": 2.0, "simpo_gamma": 0.5},
        {"beta": 2.0, "margin": 0.5, "length_normalised": True},
    ),
    "simpo, AlphaPO": (
        {"cpo_alpha": 0.0, "beta": 2.0, "simpo_gamma": 0.5, "alpha": 0.2},
        {"beta": 2.0, "margin": 0.5, "length_normalised": True, "f_divergence": "alpha", "alpha": 0.8},
    ),
}


def paired(trl_trainer, models, **attributes):
    """The loss of a trainer of TRL's that concatenates pairs itself, whose batch is ours."""
    policy, _ = models
    tokens, there, answers = batch()
    labels = tokens.masked_fill(answers == 0, -100)
    given = {"chosen_labels": labels[:P]}
    joined = {
        "concatenated_input_ids": tokens,
        "concatenated_attention_mask": there,
        "concatenated_labels": labels,
    }
    me = trainer(is_encoder_decoder=False, pad_token_id=0, padding_value=0, **attributes)
    me.concatenated_inputs = lambda *_, **__: joined
    for name in ("concatenated_forward", "cpo_loss", "odds_ratio_loss"):
        if hasattr(trl_trainer, name):
            setattr(me, name, types.MethodType(getattr(trl_trainer, name), me))
    me.get_batch_logps = trl_trainer.get_batch_logps
    return trl_trainer.get_batch_loss_metrics(me, policy, given)[0]


def without_reference(models, **options):
    policy, _ = models
    tokens, there, answers = batch()
    labels = tokens.masked_fill(answers == 0, -100)
    return linear_preference_loss(hidden_of(policy, tokens, there), policy.lm_head.weight, labels, shift=1, **options)


@EXPERIMENTAL
@pytest.mark.parametrize("name", CPO)
def test_cpo_of_trl(trl, models, name):
    cpo = pytest.importorskip("trl.experimental.cpo", exc_type=ImportError)
    theirs, options = CPO[name]
    settings = {"loss_type": name.split(",")[0], "cpo_alpha": 1.0, "alpha": 0.0, **theirs}
    loss = paired(cpo.CPOTrainer, models, **settings)
    assert_alike(without_reference(models, **options).loss, loss, [models[0].lm_head.weight])


@EXPERIMENTAL
def test_orpo_of_trl(trl, models):
    """But for its likelihood, which is of prompts too: ours is of answers, and the other is one more loss."""
    from compiled_loss import linear_cross_entropy

    orpo = pytest.importorskip("trl.experimental.orpo", exc_type=ImportError)
    loss = paired(orpo.ORPOTrainer, models)
    policy, _ = models
    tokens, there, _ = batch()
    whole = tokens.masked_fill(there == 0, -100)[:P]
    nll = linear_cross_entropy(hidden_of(policy, tokens[:P], there[:P]), policy.lm_head.weight, whole, shift=1)
    found = without_reference(models, kind="orpo", length_normalised=True)
    assert_alike(found.loss + nll, loss, [policy.lm_head.weight])


@pytest.mark.parametrize("centre", [None, 0.01])
@pytest.mark.parametrize("margins", [None, torch.tensor([0.5, 1.0, 0.0])])
def test_rewards_of_trl(trl, centre, margins):
    rewards = torch.tensor([1.0, -0.5, 2.0, 0.5, 0.3, 2.5], requires_grad=True)

    class Model:
        def __call__(self, **_):
            return types.SimpleNamespace(logits=rewards.unsqueeze(-1))

    me = trainer(model=types.SimpleNamespace(training=True))
    me.args.center_rewards_coefficient = centre
    inputs = {"attention_mask": torch.ones(6, 2)} | ({} if margins is None else {"margin": margins})
    loss = trl.RewardTrainer.compute_loss(me, Model(), inputs)
    found = bradley_terry_loss(*rewards.split(3), pair_margins=margins, center_coefficient=centre or 0.0)
    assert_alike(found.loss, loss, [rewards])
    assert found.metrics.accuracy.item() == pytest.approx(me._metrics["train"]["accuracy"][0])


LIGER = {  # the Module and its options, ours
    "DPO, sigmoid": ("DPO", {"loss_type": "sigmoid"}, {}),
    "DPO, hinge": ("DPO", {"loss_type": "hinge"}, {"kind": "hinge"}),
    "DPO, robust": ("DPO", {"loss_type": "robust", "label_smoothing": 0.1}, {"kind": "robust", **SMOOTHED}),
    "DPO, exo": ("DPO", {"loss_type": "exo_pair", "label_smoothing": 0.1}, {"kind": "exo", **SMOOTHED}),
    "DPO, nca": ("DPO", {"loss_type": "nca_pair"}, {"kind": "nca"}),
    "DPO, bco": ("DPO", {"loss_type": "bco_pair"}, {"kind": "bco"}),
    "DPO, sppo": ("DPO", {"loss_type": "sppo_hard"}, {"kind": "sppo"}),
    "DPO, apo_zero": ("DPO", {"loss_type": "apo_zero"}, {"kind": "apo_zero"}),
    "DPO, apo_down": ("DPO", {"loss_type": "apo_down"}, {"kind": "apo_down"}),
    "CPO": ("CPO", {"label_smoothing": 0.1, "alpha": 0.8}, {**SMOOTHED, "sft_coefficient": 0.8}),
    "SimPO": (
        "SimPO",
        {"beta": 2.0, "gamma": 0.5, "compute_nll_loss": False},
        {"beta": 2.0, "margin": 0.5, "length_normalised": True},
    ),
    "ORPO": ("ORPO", {}, {"kind": "orpo", "length_normalised": True, "sft_coefficient": 1.0}),
}


@pytest.mark.parametrize("name", LIGER)
def test_liger(name):
    liger = pytest.importorskip("liger_kernel.chunked_loss", exc_type=ImportError)
    module, theirs, options = LIGER[name]
    random = torch.Generator().manual_seed(5)
    hidden = torch.randn(2 * P, S, WIDTH, generator=random).requires_grad_()
    weight = torch.randn(VOCAB, WIDTH, generator=random).requires_grad_()
    compared, head = torch.randn(2 * P, S, WIDTH, generator=random), torch.randn(VOCAB, WIDTH, generator=random)
    tokens, _, answers = batch()
    labels = tokens.masked_fill(answers == 0, -100)
    loss_of = getattr(liger, f"LigerFusedLinear{module}Loss")(compiled=False, **theirs)
    if module == "DPO":
        loss, _ = loss_of(weight, hidden, labels, ref_input=compared, ref_weight=head)
        options = {"reference_hidden": compared, "reference_weight": head, **options}
    else:
        loss, _ = loss_of(weight, hidden, labels)
    assert_alike(linear_preference_loss(hidden, weight, labels, **options).loss, loss, [hidden, weight])


def test_kto_of_liger():
    liger = pytest.importorskip("liger_kernel.chunked_loss", exc_type=ImportError)
    random = torch.Generator().manual_seed(5)
    hidden = torch.randn(6, S, WIDTH, generator=random).requires_grad_()
    weight = torch.randn(VOCAB, WIDTH, generator=random).requires_grad_()
    compared = torch.randn(6, S, WIDTH, generator=random)
    tokens, _, answers, *_, desirable = kto_inputs()
    labels = tokens.masked_fill(answers == 0, -100)
    loss_of = liger.LigerFusedLinearKTOLoss(compiled=False, use_ref_model=True)
    kl = torch.tensor(0.4)
    loss, *_ = loss_of(hidden, weight, labels, None, desirable, ref_input=compared, ref_weight=weight.detach(), kl=kl)
    found = linear_kto_loss(hidden, weight, labels, desirable, reference_hidden=compared, kl=kl)
    assert_alike(found.loss, loss, [hidden, weight])
