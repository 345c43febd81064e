"""Losses of pairs of answers: the specification's numbers and gradients, plain and fused, and what trainers log."""

import cases
import pytest
import torch
from comparing import assert_accurate, assert_matches, assert_same
from torch._dynamo.testing import CompileCounter

from compiled_loss import Chunking, linear_preference_loss, linear_token_statistics, preference_loss, reference
from compiled_loss.functional.preference_terms import DIVERGENCES, KINDS, MARGINED, SCORED, SMOOTHED
from compiled_loss.testing import head_inputs

P, S, WIDTH, VOCAB = 3, 7, 5, 29


def batch(dtype=torch.float64, ignored=0.3):
    """(hidden, weight, labels, log-probabilities of the reference): answers of different lengths, one of one token."""
    random = torch.Generator().manual_seed(4)
    hidden, weight, labels, _ = head_inputs(2 * P * S, WIDTH, VOCAB, dtype=dtype, ignored=ignored)
    hidden, labels = hidden.detach().reshape(2 * P, S, WIDTH).requires_grad_(), labels.reshape(2 * P, S)
    labels[1, 1:], labels[1, 0] = -100, 3
    logprob = linear_token_statistics(hidden, weight, labels).logprob.detach()
    return hidden, weight, labels, logprob + 0.5 * torch.randn(2 * P, S, generator=random, dtype=dtype)


def options_of(kind, **more):
    """All that this kind takes, none of it as by default."""
    random = torch.Generator().manual_seed(5)
    margins, weights = torch.rand(2, P, generator=random, dtype=torch.float64)
    options = {"kind": kind, "beta": 0.7, "sft_coefficient": 0.3, "pair_weights": weights, "num_chosen_tokens": 31}
    if kind in MARGINED:
        options |= {"margin": 0.4, "pair_margins": margins}
    if kind in SMOOTHED:
        options["label_smoothing"] = 0.2
    if kind == "orpo":
        options["length_normalised"] = True
    return options | more


def truth(**options):
    """The specification as a function of the batch; ORPO has no reference."""

    def loss(hidden, weight, labels, compared):
        logprob = reference.linear_token_statistics(hidden, weight, labels)[0]
        compared = None if options["kind"] == "orpo" else compared
        return reference.preference_loss(logprob, reference_logprob=compared, mask=labels != -100, **options)

    return loss


def plain(**options):
    def loss(hidden, weight, labels, compared):
        logprob = linear_token_statistics(hidden, weight, labels).logprob
        compared = None if options["kind"] == "orpo" else compared
        return preference_loss(logprob, reference_logprob=compared, mask=labels != -100, **options).loss

    return loss


def fused(**options):
    def loss(hidden, weight, labels, compared):
        compared = None if options["kind"] == "orpo" else compared
        return linear_preference_loss(hidden, weight, labels, reference_logprob=compared, **options).loss

    return loss


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_matches_the_reference(kind, normalised):
    options = options_of(kind, **({"length_normalised": True} if normalised else {}))
    assert_matches(plain(**options), truth(**options), batch())
    for name in ("vocab", "default"):
        assert_matches(fused(chunking=cases.CHUNKINGS[name], **options), truth(**options), batch())


def test_the_mean_over_pairs():
    options = {"kind": "sigmoid", "sft_coefficient": 1.5}
    assert_matches(fused(**options), truth(**options), batch())


@pytest.mark.parametrize("kind", SCORED)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_divergences(divergence, kind):
    for alpha in (0.3, 1.0, 1.4) if divergence == "alpha" else (0.5,):
        options = options_of(kind, f_divergence=divergence, alpha=alpha)
        assert_matches(plain(**options), truth(**options), batch())


def test_the_paper_of_each_method():
    """Closed forms that papers give, of one pair whose numbers are known."""
    chosen, rejected = torch.tensor(-2.0, dtype=torch.float64), torch.tensor(-6.0, dtype=torch.float64)
    logprob = torch.stack([chosen / 2, chosen / 2, rejected / 2, rejected / 2]).view(2, 2)

    def loss(**options):
        return preference_loss(logprob, **options).loss

    def logsigmoid(x):
        return torch.sigmoid(torch.as_tensor(x, dtype=torch.float64)).log()

    simpo = loss(length_normalised=True, beta=2.0, margin=0.5)
    torch.testing.assert_close(simpo, -logsigmoid(2.0 * (-1.0 - -3.0) - 0.5))
    torch.testing.assert_close(loss(beta=0.1, sft_coefficient=1.0), -logsigmoid(0.1 * 4.0) + 1.0)  # CPO
    p, q = torch.tensor([-1.0, -3.0], dtype=torch.float64).exp()
    odds_ratio = (p / (1 - p)) / (q / (1 - q))
    orpo = loss(kind="orpo", length_normalised=True, beta=0.25, sft_coefficient=1.0)
    torch.testing.assert_close(orpo, 1.0 - 0.25 * logsigmoid(odds_ratio.log()))
    alpha = 0.25  # AlphaPO: r = (1 - p^-alpha) / alpha
    difference = ((1 - p**-alpha) - (1 - q**-alpha)) / alpha
    alphapo = loss(length_normalised=True, beta=2.0, margin=0.5, f_divergence="alpha", alpha=1 - alpha)
    torch.testing.assert_close(alphapo, -logsigmoid(2.0 * difference - 0.5))


@pytest.mark.parametrize("head", ["the policy's", "its own", "its own and a bias"])
def test_a_reference_of_hidden_states(head):
    """Its log-probabilities are those of its head, and no gradient goes there."""
    hidden, weight, labels, _ = batch()
    random = torch.Generator().manual_seed(6)
    bias = torch.randn(VOCAB, generator=random, dtype=torch.float64, requires_grad=True)
    width = WIDTH if head == "the policy's" else WIDTH + 2
    theirs = torch.randn(2 * P, S, width, generator=random, dtype=torch.float64, requires_grad=True)
    own = torch.randn(VOCAB, width, generator=random, dtype=torch.float64, requires_grad=True)
    options = {"softcap": 3.0, "temperature": 0.7, "logit_scale": 1.2, "bias": bias}
    given = {"reference_hidden": theirs}
    if head != "the policy's":
        given["reference_weight"] = own
    if head.endswith("bias"):
        given["reference_bias"] = bias.detach().flip(0)
    shown = {**options, "bias": bias if head == "the policy's" else given.get("reference_bias")}
    compared = linear_token_statistics(theirs, given.get("reference_weight", weight), labels, **shown).logprob
    found = linear_preference_loss(hidden, weight, labels, **given, **options)
    expected = linear_preference_loss(hidden, weight, labels, reference_logprob=compared.detach(), **options)
    assert_same(found.loss, expected.loss, [hidden, weight, bias])
    torch.testing.assert_close(found.reference_sequence_logprob, expected.reference_sequence_logprob)
    found = linear_preference_loss(hidden, weight, labels, **given, **options)
    found.loss.backward()
    assert theirs.grad is own.grad is None


def test_a_cached_reference():
    """What a call returns of its reference is what a later one takes."""
    hidden, weight, labels, compared = batch()
    for normalised in (False, True):
        options = {"length_normalised": normalised}
        first = linear_preference_loss(hidden, weight, labels, reference_logprob=compared, **options)
        again = linear_preference_loss(
            hidden, weight, labels, reference_logprob=first.reference_sequence_logprob, **options
        )
        torch.testing.assert_close(again, first)
    theirs = compared.clone().requires_grad_()
    linear_preference_loss(hidden, weight, labels, reference_logprob=theirs).loss.backward()
    assert theirs.grad is None
    own = linear_preference_loss(hidden, weight, labels)
    at_start = linear_preference_loss(hidden, weight, labels, reference_logprob=own.sequence_logprob)
    torch.testing.assert_close(at_start.loss, torch.tensor(2.0, dtype=torch.float64).log())


def test_packed_answers_are_those_of_a_batch():
    """In an order of tokens that is no answer's."""
    hidden, weight, labels, compared = batch()
    order = torch.randperm(2 * P * S, generator=torch.Generator().manual_seed(7))
    segments = torch.arange(2 * P).repeat_interleave(S)[order]
    for kind in ("sigmoid", "orpo"):
        options, flat = options_of(kind), [v.flatten(0, 1)[order] for v in (hidden, labels, compared)]
        given = {} if kind == "orpo" else {"reference_logprob": flat[2]}
        packed = linear_preference_loss(flat[0], weight, flat[1], segment_ids=segments, num_pairs=P, **given, **options)
        expected = linear_preference_loss(
            hidden, weight, labels, **options, **({} if kind == "orpo" else {"reference_logprob": compared})
        )
        torch.testing.assert_close(packed.metrics, expected.metrics)
        torch.testing.assert_close(packed.sequence_logprob, expected.sequence_logprob)
        assert_same(packed.loss, expected.loss, [hidden, weight])


def test_shifted_labels():
    """Labels as models have them, beside a mask and segments of the same places."""
    hidden, weight, labels, _ = batch()
    mask = torch.rand(2 * P, S, generator=torch.Generator().manual_seed(8)) < 0.8
    found = linear_preference_loss(hidden, weight, labels, mask=mask, shift=1)
    expected = linear_preference_loss(hidden[:, :-1], weight, labels[:, 1:], mask=mask[:, 1:])
    torch.testing.assert_close(found.loss, expected.loss)
    random = torch.Generator().manual_seed(8)
    flat = [hidden.flatten(0, 1), labels.flatten()]
    segments = torch.randint(0, 2 * P, (2 * P * S,), generator=random)  # of labels, whatever predicts them
    packed = linear_preference_loss(flat[0], weight, flat[1], shift=1, segment_ids=segments, num_pairs=P)
    expected = linear_preference_loss(flat[0][:-1], weight, flat[1][1:], segment_ids=segments[1:], num_pairs=P)
    torch.testing.assert_close(packed.sequence_logprob, expected.sequence_logprob)
    torch.testing.assert_close(packed.loss, expected.loss)


@pytest.mark.parametrize("packed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_compiled(packed):
    hidden, weight, labels, compared = batch()
    options = options_of("sigmoid")
    given = {"segment_ids": torch.arange(2 * P).repeat_interleave(S), "num_pairs": P} if packed else {}

    def loss(hidden, weight, labels, compared):
        if packed:
            hidden, labels, compared = (v.flatten(0, 1) for v in (hidden, labels, compared))
        return linear_preference_loss(hidden, weight, labels, reference_logprob=compared, **given, **options).loss

    compiled = torch.compile(loss, fullgraph=True)
    assert_matches(compiled, truth(**options), (hidden, weight, labels, compared))


def test_what_changes_from_call_to_call_compiles_nothing():
    """Numbers, and after two sizes any number of pairs and of tokens."""
    counter = CompileCounter()

    def loss(hidden, weight, labels, theirs, beta, margin, coefficient):
        options = {"beta": beta, "margin": margin, "label_smoothing": coefficient, "sft_coefficient": coefficient}
        return linear_preference_loss(hidden, weight, labels, reference_hidden=theirs, **options).loss

    run = torch.compile(loss, fullgraph=True, backend=counter)
    for i, numbers in enumerate(((0.1, 0.5, 0.1), (0.2, 0.6, 0.2), (0.3, 0.7, 0.05), (0.4, 0.2, 0.3))):
        hidden, weight, labels, _ = head_inputs(2 * (P + i) * (S + i), WIDTH, VOCAB, dtype=torch.float64, ignored=0.2)
        hidden, labels = hidden.view(2 * (P + i), S + i, WIDTH), labels.view(2 * (P + i), S + i)
        inputs = (hidden, weight, labels, hidden.detach() + 0.1)
        torch.testing.assert_close(run(*inputs, *numbers), loss(*inputs, *numbers))
    assert counter.frame_count == 2


def test_metrics():
    """What trainers compute of the same tensors, each by its definition."""
    hidden, weight, labels, compared = batch()
    found = linear_preference_loss(hidden, weight, labels, reference_logprob=compared, beta=0.3)
    logprob = reference.linear_token_statistics(hidden, weight, labels)[0].detach()
    counts = labels != -100
    sums, theirs = (torch.stack([row[c].sum() for row, c in zip(v, counts)]) for v in (logprob, compared))  # noqa: B905
    chosen, rejected = (0.3 * (sums - theirs)).split(P)
    expected = {
        "reward_chosen": chosen.mean(),
        "reward_rejected": rejected.mean(),
        "reward_margin": (chosen - rejected).mean(),
        "accuracy": (chosen > rejected).double().mean(),
        "logprob_chosen": sums[:P].mean(),
        "logprob_rejected": sums[P:].mean(),
        "nll_chosen": -logprob[:P][counts[:P]].mean(),
    }
    assert 0 < expected["accuracy"] < 1
    assert found.metrics._fields == tuple(expected)
    for name, value in expected.items():
        torch.testing.assert_close(getattr(found.metrics, name), value, msg=name)
    torch.testing.assert_close(found.logprob, torch.where(counts, logprob, 0.0))
    torch.testing.assert_close((found.sequence_logprob, found.reference_sequence_logprob), (sums, theirs))
    flat = [*found.metrics, found.logprob, found.sequence_logprob, found.reference_sequence_logprob]
    assert not any(value.requires_grad for value in flat)


def test_what_does_not_count_may_hold_anything():
    """Of a pair that has no token, its margins, its weight and its reference, too."""
    hidden, weight, labels, compared = batch()
    labels[2], labels[P + 2] = -100, -100
    ignored = labels == -100
    poisoned = hidden.detach().masked_fill(ignored.unsqueeze(-1), torch.nan).requires_grad_()
    for kind in KINDS:
        options = options_of(kind)
        bad = dict(options)
        for name in ("pair_margins", "pair_weights"):
            if name in bad:
                bad[name] = bad[name].clone().index_fill(0, torch.tensor([2]), torch.nan)
        theirs = {} if kind == "orpo" else {"reference_logprob": compared}
        dirty = {name: v.masked_fill(ignored, torch.inf) for name, v in theirs.items()}
        clean = linear_preference_loss(hidden, weight, labels, **theirs, **options)
        found = linear_preference_loss(poisoned, weight, labels, **dirty, **bad)
        torch.testing.assert_close(found, clean)
        mine = torch.autograd.grad(found.loss, (poisoned, weight))
        torch.testing.assert_close(mine, torch.autograd.grad(clean.loss, (hidden, weight)))


@pytest.mark.parametrize("kind", KINDS)
def test_answers_without_tokens(kind):
    """A pair with one answer counts, finitely; a batch without any is 0 and has a gradient, 0."""
    hidden, weight, labels, compared = batch()
    options = {key: v for key, v in options_of(kind).items() if key not in ("pair_weights", "num_chosen_tokens")}
    given = {} if kind == "orpo" else {"reference_logprob": compared}
    for empty in (0, P + 1):
        fewer = labels.index_fill(0, torch.tensor([empty]), -100)
        found = linear_preference_loss(hidden, weight, fewer, **given, **options)
        if kind != "orpo":  # whose odds of nothing are bounded by the dtype
            torch.testing.assert_close(found.loss, truth(**options)(hidden, weight, fewer, compared))
        gradients = torch.autograd.grad(found.loss, (hidden, weight))
        assert all(v.isfinite().all() for v in (found.loss, *gradients))
    none = linear_preference_loss(hidden, weight, torch.full_like(labels, -100), **given, **options)
    assert none.loss == 0
    assert not any(g.any() for g in torch.autograd.grad(none.loss, (hidden, weight)))
    assert all(value == 0 for value in none.metrics)


def test_one_token_a_sequence():
    """Fewest of all: one pair, one token each, as packed tokens whose number is that of the answers."""
    logprob = torch.tensor([-1.0, -2.0], dtype=torch.float64, requires_grad=True)
    found = preference_loss(logprob, segment_ids=torch.tensor([1, 0]), num_pairs=1, beta=1.0)
    torch.testing.assert_close(found.loss, -torch.sigmoid(torch.tensor(-1.0, dtype=torch.float64)).log())
    torch.testing.assert_close(found.sequence_logprob, torch.tensor([-2.0, -1.0], dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_inputs(dtype):
    """Within twice the error of the unchunked computation in the same dtypes."""
    hidden, weight, labels, compared = batch()
    inputs = [v.detach().to(dtype).requires_grad_() for v in (hidden, weight)]
    options = options_of("sigmoid")
    run = fused(chunking=Chunking(chunk_size=4, strategy="vocab"), **options)
    assert run(*inputs, labels, compared.float()).dtype == torch.float32
    assert_accurate(run, truth(**options), truth(**options), (*inputs, labels, compared.float()))


def test_half_precision_is_computed_in_single():
    logprob = torch.full((2, 3), -1.0).half()
    found = preference_loss(logprob, reference_logprob=logprob.bfloat16(), beta=torch.tensor(0.1))
    assert {v.dtype for v in (found.loss, *found.metrics, found.sequence_logprob)} == {torch.float32}


def test_far_scores_are_finite():
    """Answers of thousands of nats: exponents are bounded, and odds of certain answers are."""
    logprob = torch.tensor([[-9000.0], [-1e-35]], requires_grad=True)
    for options in (
        {"kind": "orpo", "length_normalised": True},
        *({"f_divergence": name, "alpha": alpha} for name in DIVERGENCES for alpha in (0.5, 1.5)),
    ):
        for rows in (logprob, logprob.flip(0)):
            found = preference_loss(rows, **options)
            (gradient,) = torch.autograd.grad(found.loss, logprob)
            assert found.loss.isfinite() and gradient.isfinite().all(), options


def test_under_transforms():
    hidden, weight, labels, compared = batch()
    options = options_of("robust")
    expected = torch.autograd.grad(fused(**options)(hidden, weight, labels, compared), (hidden, weight))
    found = torch.func.grad(fused(**options), (0, 1))(hidden, weight, labels, compared)
    torch.testing.assert_close(found, expected)
    rows = torch.stack([compared, compared + 0.1])
    many = torch.vmap(lambda theirs: preference_loss(compared, reference_logprob=theirs).loss)(rows)
    alone = torch.stack([preference_loss(compared, reference_logprob=theirs).loss for theirs in rows])
    torch.testing.assert_close(many, alone)


def test_invalid_labels_are_nan_where_they_are_not_read():
    hidden, weight, labels, compared = batch()
    labels[0, 0] = VOCAB + 3
    run = torch.compile(fused(kind="sigmoid"), backend="eager", fullgraph=True)
    assert run(hidden, weight, labels, compared).isnan()
