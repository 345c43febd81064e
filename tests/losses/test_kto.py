"""Losses of single answers and of rewards: the specification's numbers and gradients, plain and fused."""

import cases
import pytest
import torch
from comparing import assert_accurate, assert_matches, assert_same
from torch._dynamo.testing import CompileCounter

from compiled_loss import bradley_terry_loss, kto_loss, linear_kto_loss, linear_token_statistics, reference
from compiled_loss.testing import head_inputs

B, S, WIDTH, VOCAB = 5, 6, 4, 23
DESIRABLE = torch.tensor([True, False, False, True, False])
KINDS = ("kto", "apo_zero_unpaired")


def batch(dtype=torch.float64):
    """(hidden, weight, labels, log-probabilities of the reference)."""
    random = torch.Generator().manual_seed(4)
    hidden, weight, labels, _ = head_inputs(B * S, WIDTH, VOCAB, dtype=dtype, ignored=0.3)
    hidden, labels = hidden.detach().reshape(B, S, WIDTH).requires_grad_(), labels.reshape(B, S)
    logprob = linear_token_statistics(hidden, weight, labels).logprob.detach()
    return hidden, weight, labels, logprob + 0.5 * torch.randn(B, S, generator=random, dtype=dtype)


def options_of(kind, weighted=True):
    options = {"kind": kind, "beta": 0.7, "desirable_weight": 1.3, "undesirable_weight": 0.6}
    if weighted:
        options["sequence_weights"] = torch.linspace(0.1, 1.2, B, dtype=torch.float64)
    return options | ({"kl": torch.tensor([0.9, -0.2, 0.4], dtype=torch.float64)} if kind == "kto" else {})


def truth(**options):
    def loss(hidden, weight, labels, compared):
        logprob = reference.linear_token_statistics(hidden, weight, labels)[0]
        return reference.kto_loss(logprob, DESIRABLE, reference_logprob=compared, mask=labels != -100, **options)

    return loss


def plain(**options):
    def loss(hidden, weight, labels, compared):
        logprob = linear_token_statistics(hidden, weight, labels).logprob
        return kto_loss(logprob, DESIRABLE, reference_logprob=compared, mask=labels != -100, **options).loss

    return loss


def fused(**options):
    def loss(hidden, weight, labels, compared):
        return linear_kto_loss(hidden, weight, labels, DESIRABLE, reference_logprob=compared, **options).loss

    return loss


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_matches_the_reference(kind, weighted):
    options = options_of(kind, weighted)
    assert_matches(plain(**options), truth(**options), batch())
    for name in ("vocab", "default"):
        assert_matches(fused(chunking=cases.CHUNKINGS[name], **options), truth(**options), batch())


@pytest.mark.slow
def test_compiled():
    options = options_of("kto")
    assert_matches(torch.compile(fused(**options), fullgraph=True), truth(**options), batch())


def test_the_baseline():
    """The mean of log-ratios, or their mean already; none below 0, and no gradient."""
    inputs = batch()
    ratios = torch.tensor([0.9, -0.2, 0.4], dtype=torch.float64, requires_grad=True)
    of_each, of_mean = (fused(kl=kl)(*inputs) for kl in (ratios, ratios.mean()))
    torch.testing.assert_close(of_each, of_mean)
    of_each.backward()
    assert ratios.grad is None
    negative, zero = (fused(kl=torch.tensor(kl))(*inputs) for kl in (-0.3, 0.0))
    torch.testing.assert_close(negative, zero)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(zero, of_mean)


def test_packed_answers_and_a_reference_of_hidden_states():
    hidden, weight, labels, _ = batch()
    options = options_of("kto")
    theirs = hidden.detach() + 0.3
    segments = torch.arange(B).repeat_interleave(S)
    packed = linear_kto_loss(
        hidden.flatten(0, 1),
        weight,
        labels.flatten(),
        DESIRABLE,
        segment_ids=segments,
        reference_hidden=theirs.flatten(0, 1),
        **options,
    )
    compared = linear_token_statistics(theirs, weight, labels).logprob.detach()
    whole = linear_kto_loss(hidden, weight, labels, DESIRABLE, reference_logprob=compared, **options)
    torch.testing.assert_close(packed.metrics, whole.metrics)
    cached = linear_kto_loss(
        hidden, weight, labels, DESIRABLE, reference_logprob=packed.reference_sequence_logprob, **options
    )
    torch.testing.assert_close(cached, whole)
    assert_same(packed.loss, whole.loss, [hidden, weight])


def test_metrics():
    hidden, weight, labels, compared = batch()
    kl = torch.tensor(0.25, dtype=torch.float64)
    found = linear_kto_loss(hidden, weight, labels, DESIRABLE, reference_logprob=compared, kl=kl, beta=0.3)
    logprob, counts = reference.linear_token_statistics(hidden, weight, labels)[0].detach(), labels != -100
    sums, theirs = (torch.stack([v[b][counts[b]].sum() for b in range(B)]) for v in (logprob, compared))
    rewards = 0.3 * (sums - theirs)
    expected = {
        "reward_desirable": rewards[DESIRABLE].mean(),
        "reward_undesirable": rewards[~DESIRABLE].mean(),
        "reward_margin": rewards[DESIRABLE].mean() - rewards[~DESIRABLE].mean(),
        "logprob_desirable": sums[DESIRABLE].mean(),
        "logprob_undesirable": sums[~DESIRABLE].mean(),
        "kl": kl,
    }
    assert found.metrics._fields == tuple(expected)
    for name, value in expected.items():
        torch.testing.assert_close(getattr(found.metrics, name), value, msg=name)
    alone = kto_loss(compared[:1], DESIRABLE[:1], kind="apo_zero_unpaired").metrics
    assert alone.kl is None
    assert alone.reward_undesirable == 0


@pytest.mark.parametrize("kind", KINDS)
def test_what_does_not_count_may_hold_anything(kind):
    hidden, weight, labels, compared = batch()
    labels[2] = -100
    ignored = labels == -100
    poisoned = hidden.detach().masked_fill(ignored.unsqueeze(-1), torch.nan).requires_grad_()
    options = options_of(kind)
    bad = {**options, "sequence_weights": options["sequence_weights"].index_fill(0, torch.tensor([2]), torch.nan)}
    clean = linear_kto_loss(hidden, weight, labels, DESIRABLE, reference_logprob=compared, **options)
    rows = compared.masked_fill(ignored, torch.inf)
    dirty = linear_kto_loss(poisoned, weight, labels, DESIRABLE, reference_logprob=rows, **bad)
    torch.testing.assert_close(dirty, clean)
    mine = torch.autograd.grad(dirty.loss, (poisoned, weight))
    torch.testing.assert_close(mine, torch.autograd.grad(clean.loss, (hidden, weight)))
    none = linear_kto_loss(hidden, weight, torch.full_like(labels, -100), DESIRABLE, **options)
    assert none.loss == 0
    assert not any(g.any() for g in torch.autograd.grad(none.loss, (hidden, weight)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs(dtype):
    """Within twice the error of the unchunked computation in the same dtypes."""
    hidden, weight, labels, compared = batch()
    inputs = [v.detach().to(dtype).requires_grad_() for v in (hidden, weight)]
    options = options_of("kto")
    run = fused(chunking=cases.CHUNKINGS["vocab"], **options)
    assert_accurate(run, truth(**options), truth(**options), (*inputs, labels, compared.float()))


def test_what_changes_from_call_to_call_compiles_nothing():
    counter = CompileCounter()

    def loss(logprob, desirable, kl, beta, weight):
        return kto_loss(logprob, desirable, kl=kl, beta=beta, desirable_weight=weight).loss

    run = torch.compile(loss, fullgraph=True, backend=counter)
    for i, numbers in enumerate(((0.1, 1.1), (0.2, 1.2), (0.3, 1.3), (0.4, 1.5))):
        inputs = (torch.randn(4 + i, 3 + i), torch.rand(4 + i) < 0.5, torch.rand(2 + i))
        torch.testing.assert_close(run(*inputs, *numbers), loss(*inputs, *numbers))
    assert counter.frame_count == 2


def test_under_transforms():
    inputs = batch()
    options = options_of("kto")
    expected = torch.autograd.grad(fused(**options)(*inputs), inputs[:2])
    torch.testing.assert_close(torch.func.grad(fused(**options), (0, 1))(*inputs), expected)


# Rewards ------------------------------------------------------------------------------------------------------------


def rewards(dtype=torch.float64):
    random = torch.Generator().manual_seed(9)
    return [3 * torch.randn(7, generator=random, dtype=dtype).requires_grad_() for _ in range(2)]


REWARDS = {
    "plain": {},
    "margins": {"pair_margins": torch.linspace(0, 2, 7, dtype=torch.float64)},
    "centre": {"center_coefficient": 0.01},
    "mask": {"mask": torch.arange(7) % 3},
    "weights": {"pair_weights": torch.linspace(0, 1, 7, dtype=torch.float64), "mask": torch.arange(7) > 2},
    "nothing": {"mask": torch.zeros(1)},
}


@pytest.mark.parametrize("name", REWARDS)
def test_rewards(name):
    def loss(chosen, rejected):
        return bradley_terry_loss(chosen, rejected, center_coefficient=0.1, **keywords).loss

    def truth_(chosen, rejected):
        zero = 0 * (chosen.sum() + rejected.sum())  # attached, where nothing counts
        return reference.bradley_terry_loss(chosen, rejected, center_coefficient=0.1, **keywords) + zero

    keywords = {key: v for key, v in REWARDS[name].items() if key != "center_coefficient"}
    leaves = [v.detach().requires_grad_() for v in rewards()]
    assert_matches(loss, truth_, leaves)
    assert_matches(torch.compile(loss, backend="aot_eager", fullgraph=True), truth_, leaves)


def test_metrics_of_rewards():
    chosen, rejected = (v.detach() for v in rewards())
    found = bradley_terry_loss(chosen, rejected, mask=torch.arange(7) < 5).metrics
    c, r = chosen[:5], rejected[:5]
    expected = (c.mean(), r.mean(), (c - r).mean(), (c > r).double().mean())
    assert 0 < expected[3] < 1
    torch.testing.assert_close(tuple(found), expected)


def test_rewards_that_do_not_count_may_hold_anything():
    chosen, rejected = (v.detach().requires_grad_() for v in rewards())
    mask = torch.arange(7) < 5
    bad = [torch.where(mask, v, torch.nan).detach().requires_grad_() for v in (chosen, rejected)]
    margins = torch.where(mask, 0.5, torch.inf)
    clean = bradley_terry_loss(chosen, rejected, mask=mask, pair_margins=torch.full((7,), 0.5))
    dirty = bradley_terry_loss(*bad, mask=mask, pair_margins=margins)
    torch.testing.assert_close(dirty, clean)
    torch.testing.assert_close(
        torch.autograd.grad(dirty.loss, bad), torch.autograd.grad(clean.loss, (chosen, rejected))
    )


def test_half_precision_is_computed_in_single():
    chosen, rejected = (v.detach().to(torch.bfloat16) for v in rewards())
    found = bradley_terry_loss(chosen, rejected)
    assert found.loss.dtype == found.metrics.accuracy.dtype == torch.float32
    torch.testing.assert_close(found.loss, bradley_terry_loss(chosen.float(), rejected.float()).loss)
