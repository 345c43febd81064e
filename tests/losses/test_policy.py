"""Policy losses: the specification's numbers and gradients, plain and fused, and what trainers log."""

import cases
import pytest
import torch
from comparing import assert_matches

from compiled_loss import (
    Chunking,
    linear_policy_loss,
    linear_token_statistics,
    make_token_weights,
    policy_loss,
    reference,
)
from compiled_loss.testing import count_graphs, head_inputs

B, S, WIDTH, VOCAB = 3, 7, 5, 29


def batch(dtype=torch.float64):
    """(hidden, weight, labels, old log-probabilities, advantages), more than half of whose ratios are clipped."""
    random = torch.Generator().manual_seed(2)
    hidden, weight, labels, _ = head_inputs(B * S, WIDTH, VOCAB, dtype=dtype, ignored=0.2)
    hidden, labels = hidden.detach().reshape(B, S, WIDTH).requires_grad_(), labels.reshape(B, S)
    logprob = linear_token_statistics(hidden, weight, labels).logprob.detach()
    old = logprob + 0.4 * torch.randn(B, S, generator=random, dtype=dtype)
    return hidden, weight, labels, old, torch.randn(B, S, generator=random, dtype=dtype)


def more(old):
    """What a loss may have beside."""
    random = torch.Generator().manual_seed(3)
    rows = [torch.rand(B, S, generator=random, dtype=old.dtype) for _ in range(4)]
    return {
        "reference_logprob": old - 0.3 * rows[0],
        "correction": 0.5 + rows[1],
        "token_weights": rows[2],
        "entropy_weights": rows[3],
        "kl_coefficient": 0.3,
        "entropy_coefficient": 0.2,
    }


def truth(**options):
    """The specification as a function of the batch."""
    bonus = options.get("entropy_coefficient")

    def loss(hidden, weight, labels, old, advantages):
        logprob, _, entropy, *_ = reference.linear_token_statistics(hidden, weight, labels)
        entropy = entropy if bonus else None
        return reference.policy_loss(logprob, old, advantages, entropy=entropy, mask=labels != -100, **options)

    return loss


def plain(**options):
    """`policy_loss` of log-probabilities as a function of the batch."""
    bonus = options.get("entropy_coefficient")

    def loss(hidden, weight, labels, old, advantages):
        found = linear_token_statistics(hidden, weight, labels)
        entropy = found.entropy if bonus else None
        return policy_loss(found.logprob, old, advantages, entropy=entropy, mask=labels != -100, **options).loss

    return loss


def fused(**options):
    return lambda *inputs: linear_policy_loss(*inputs, **options).loss


KINDS = {
    "clip": {"kind": "clip", "clip_low": 0.1, "clip_high": 0.3},
    "dual": {"kind": "clip", "dual_clip": 1.3},
    "cispo": {"kind": "cispo", "clip_high": 1.2},
    "cispo_two_sided": {"kind": "cispo_two_sided"},
    "sapo": {"kind": "sapo", "temperature_positive": 1.5, "temperature_negative": 2.5},
    "gmpo": {"kind": "gmpo", "clip_low": 0.1, "clip_high": 0.3, "importance": "sequence"},
    "reinforce": {"kind": "reinforce"},
}


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("importance", ["token", "sequence"])
@pytest.mark.parametrize("kind", KINDS)
def test_matches_the_reference(kind, importance, everything):
    inputs = batch()
    options = {"importance": importance, **KINDS[kind], **(more(inputs[3]) if everything else {})}
    importance = options["importance"]
    assert_matches(plain(**options), truth(**options), inputs)
    for name in ("tokens", "vocab") if importance == "token" else ("vocab",):
        assert_matches(fused(chunking=cases.CHUNKINGS[name], **options), truth(**options), inputs)


@pytest.mark.parametrize("kl", ["k1", "k2", "k3", "k1_straight_through", "k3_straight_through"])
def test_kl(kl):
    inputs = batch()
    options = {"reference_logprob": inputs[3] - 0.2, "kl": kl, "kl_coefficient": 0.7}
    assert_matches(fused(**options), truth(**options), inputs)
    assert_matches(plain(**options), truth(**options), inputs)


@pytest.mark.parametrize("importance", ["token", pytest.param("sequence", marks=pytest.mark.slow)])
def test_compiled(importance):
    inputs = batch()
    options = {"importance": importance, **more(inputs[3])}
    assert_matches(torch.compile(fused(**options), fullgraph=True), truth(**options), inputs)


@pytest.mark.parametrize("kind", ["clip", "gmpo"])
def test_numbers_that_change_compile_nothing(kind):
    """Static, then dynamic; by Inductor, which specialises what meets no tensor in arithmetic."""
    inputs = [v.detach() for v in batch()]

    def loss(*inputs, clip, coefficient):
        options = {**KINDS[kind], "clip_low": clip, "clip_high": clip, "kl_coefficient": coefficient}
        options["entropy_coefficient"] = coefficient
        return linear_policy_loss(*inputs, reference_logprob=inputs[3] - 0.2, **options)

    run = torch.compile(loss, fullgraph=True)
    torch._dynamo.utils.counters.clear()
    for clip, coefficient in ((0.2, 0.1), (0.25, 0.2), (0.28, 0.3), (0.3, 0.15), (0.1, 0.05)):
        found = run(*inputs, clip=clip, coefficient=coefficient)
        torch.testing.assert_close(found, loss(*inputs, clip=clip, coefficient=coefficient))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize("importance", ["token", "sequence"])
@pytest.mark.parametrize("advantage", [1.0, 0.0])
def test_a_ratio_beyond_all_bounds(importance, advantage):
    """One that the clip holds, or that weighs nothing: no gradient, and none that is NaN."""
    logprob = torch.zeros(1, 2, requires_grad=True)
    old, advantages = torch.tensor([[-300.0, -300.0]]), torch.full((1, 1), advantage)
    options = {"importance": importance, "reference_logprob": torch.full((1, 2), 300.0), "kl": "k3"}
    found = policy_loss(logprob, old, advantages, **options)
    found.loss.backward()
    torch.testing.assert_close(found.loss.detach(), torch.tensor(-1.2 * advantage))
    assert (logprob.grad == 0).all()
    assert all(v is None or v.isfinite() for v in found.metrics)


def test_metrics():
    """What trainers compute of the same tensors, each by its definition."""
    inputs = batch()
    _, _, labels, old, advantages = inputs
    options = more(old)
    found = linear_policy_loss(*inputs, clip_low=0.1, clip_high=0.2, **options)
    logprob, _, entropy, *_ = reference.linear_token_statistics(*inputs[:3])
    counts = labels != -100
    ratio = (logprob - old).exp()[counts]
    signs, reference_ratio = advantages[counts], (options["reference_logprob"] - logprob)[counts]
    expected = {
        "ratio_mean": ratio.mean(),
        "ratio_min": ratio.min(),
        "ratio_max": ratio.max(),
        "kl_to_old": (ratio - 1 - ratio.log()).mean(),
        "clipped_low": ((ratio < 0.9) & (signs < 0)).double().mean(),
        "clipped_high": ((ratio > 1.2) & (signs > 0)).double().mean(),
        "kl_to_reference": (reference_ratio.exp() - 1 - reference_ratio).mean(),
        "entropy": entropy[counts].mean(),
    }
    assert expected["clipped_low"] > 0
    assert expected["clipped_high"] > 0
    for name, value in expected.items():
        torch.testing.assert_close(getattr(found.metrics, name), value.detach(), msg=name)
        assert not getattr(found.metrics, name).requires_grad
    torch.testing.assert_close(found.logprob, logprob.detach())
    assert linear_policy_loss(*inputs).metrics[-2:] == (None, None)
    assert policy_loss(logprob, old, advantages, kind="sapo").metrics[4:6] == (None, None)


@pytest.mark.parametrize("importance", ["token", "sequence"])
def test_masked_tokens_may_hold_anything(importance):
    hidden, weight, labels, old, advantages = batch()
    ignored = labels == -100
    poisoned = hidden.detach().masked_fill(ignored.unsqueeze(-1), torch.nan).requires_grad_()
    rows = [v.masked_fill(ignored, torch.nan) for v in (old, advantages)]
    options = {**more(old), "importance": importance}
    bad = {k: v.masked_fill(ignored, torch.inf) if torch.is_tensor(v) else v for k, v in options.items()}
    clean = linear_policy_loss(hidden, weight, labels, old, advantages, **options)
    dirty = linear_policy_loss(poisoned, weight, labels, *rows, **bad)
    torch.testing.assert_close(dirty, clean)
    for mine, theirs in zip(
        torch.autograd.grad(dirty.loss, (poisoned, weight)),
        torch.autograd.grad(clean.loss, (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


def test_nothing_counts():
    hidden, weight, labels, old, advantages = batch()
    for importance in ("token", "sequence"):
        found = linear_policy_loss(
            hidden, weight, torch.full_like(labels, -100), old, advantages, importance=importance
        )
        assert found.loss == 0
        for gradient in torch.autograd.grad(found.loss, (hidden, weight)):
            assert not gradient.any()


def test_packed_sequences_are_those_of_a_batch():
    inputs = batch()
    hidden, weight, labels, old, advantages = inputs
    segments = torch.arange(B).repeat_interleave(S)
    whole = linear_policy_loss(*inputs, importance="sequence")
    packed = linear_policy_loss(
        hidden.flatten(0, 1),
        weight,
        *[v.flatten() for v in (labels, old, advantages)],
        importance="sequence",
        segment_ids=segments,
    )
    torch.testing.assert_close(packed.loss, whole.loss)
    mask = labels != -100
    for name in ("token_mean", "sequence_mean", "sequence_sum", "fixed_length", "sum"):
        length = 9 if name == "fixed_length" else None
        batched = make_token_weights(mask, name, length=length)
        flat = make_token_weights(mask.flatten(), name, segment_ids=segments, length=length)
        torch.testing.assert_close(flat, batched.flatten())


@pytest.mark.parametrize("counts", ["own", "global"])
def test_token_weights(counts):
    """The means that their names say, of any values."""
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]])
    values = torch.rand(3, 4)
    own = counts == "own"
    tokens, sequences = (4, 2) if own else (100, 10)
    given = {} if own else {"num_tokens": torch.tensor(100), "num_sequences": 10}
    rows = [values[i][mask[i] != 0] for i in range(2)]
    expected = {
        "token_mean": torch.cat(rows).sum() / tokens,
        "sequence_mean": sum(row.mean() for row in rows) / sequences,
        "sequence_sum": sum(row.sum() for row in rows) / sequences,
        "fixed_length": sum(row.sum() for row in rows) / sequences / 9,
        "sum": torch.cat(rows).sum(),
    }
    for name, value in expected.items():
        length = 9 if name == "fixed_length" else None
        weights = make_token_weights(mask, name, length=length, **given)
        torch.testing.assert_close((weights * values).sum(), value, msg=name)


def test_an_advantage_a_sequence():
    hidden, weight, labels, old, advantages = batch()
    one = advantages[:, :1]
    torch.testing.assert_close(
        linear_policy_loss(hidden, weight, labels, old, one),
        linear_policy_loss(hidden, weight, labels, old, one.expand(B, S).contiguous()),
    )


ERRORS = {
    "kind: expected one of 'clip', .* got 'ppo'": {"kind": "ppo"},
    "kl: expected one of 'k1', .* got 'k4'": {"kl": "k4"},
    "importance: expected one of 'token', 'sequence', got 'turn'": {"importance": "turn"},
    "clip_low: expected a number >= 0, got -0.1": {"clip_low": -0.1},
    "dual_clip: expected a number > 1 or None, got 0.5": {"dual_clip": 0.5},
    "dual_clip: expected None beside kind='sapo', got 3.0": {"dual_clip": 3.0, "kind": "sapo"},
    "temperature_positive: expected a number > 0, got 0": {"temperature_positive": 0},
    r"reference_logprob: expected \[3, 7\], a value for each token, got \[3\]": {"reference_logprob": torch.zeros(3)},
    r"correction: expected \[3, 7\], a value for each token, got \[7\]": {"correction": torch.zeros(7)},
    "token_weights: expected a Tensor where entropy_weights are given, got None": {"entropy_weights": torch.ones(B, S)},
    "segment_ids: expected int64, got torch.float32": {"segment_ids": torch.zeros(B, S)},
    r"segment_ids: expected from 0 to the number of tokens - 1, 20, got 21": {
        "segment_ids": torch.full((B, S), 21),
        "importance": "sequence",
    },
    "reference_logprob: expected a Tensor where kl_coefficient is not 0, got None": {"kl_coefficient": 0.1},
    "correction: expected float32, .* got torch.complex64": {"correction": torch.zeros(B, S, dtype=torch.complex64)},
    r"mask: expected to broadcast to the labels' \[3, 7\], got \[3\]": {"mask": torch.ones(3)},
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message):
    hidden, weight, labels, old, advantages = batch()
    with pytest.raises((ValueError, TypeError), match=f"^{message}"):
        linear_policy_loss(hidden, weight, labels, old, advantages, **ERRORS[message])
    with pytest.raises((ValueError, TypeError), match=f"^{message}"):
        policy_loss(old, old, advantages, **ERRORS[message])


def test_an_advantage_for_each_sequence_says_its_shape():
    hidden, weight, labels, old, advantages = batch()
    with pytest.raises(ValueError, match=r"a value for each token, got \[3\]: a value for each sequence is \[B, 1\]"):
        linear_policy_loss(hidden, weight, labels, old, advantages[:, 0])


def test_errors_of_weights():
    mask = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"^normalisation: expected one of 'token_mean'"):
        make_token_weights(mask, "mean")
    with pytest.raises(ValueError, match=r"^length: expected beside normalisation='fixed_length' and nowhere else"):
        make_token_weights(mask, "fixed_length")
    with pytest.raises(ValueError, match=r"^length: expected beside"):
        make_token_weights(mask, "sum", length=4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [1, 64])
def test_few_tokens_a_chunk(chunk, dtype):
    """Against fp64 of the same numbers; the bound is that of the inputs' dtype."""
    hidden, weight, labels, old, advantages = batch()
    inputs = [v.detach().to(dtype).requires_grad_() for v in (hidden, weight)]
    exact = [v.detach().double().requires_grad_() for v in inputs]
    found = linear_policy_loss(*inputs, labels, old.float(), advantages.float(), chunking=Chunking(chunk_size=chunk))
    expected = truth()(*exact, labels, old.float().double(), advantages.float().double())
    eps = torch.finfo(dtype).eps
    for mine, theirs in zip(torch.autograd.grad(found.loss, inputs), torch.autograd.grad(expected, exact), strict=True):
        assert (mine.double() - theirs).norm() <= 8 * eps * theirs.norm()


def test_the_gradient_of_a_weight_of_zero_in_fp16():
    """Beside own entropy weights; against fp64."""
    hidden, weight, labels, old, advantages = batch(torch.float32)
    half = [v.detach().half() for v in (hidden, weight)]
    weights, bonus = torch.ones(B, S), torch.ones(B, S)
    zero = tuple((labels >= 0).nonzero()[0])
    weights[zero] = bonus[zero] = 0.0
    options = {"entropy_coefficient": 0.1, "entropy_weights": bonus}
    found = linear_policy_loss(*half, labels, old, advantages, token_weights=weights.requires_grad_(), **options).loss
    exact = weights.detach().double().requires_grad_()
    options["entropy_weights"] = bonus.double()
    rows = (labels, old.double(), advantages.double())
    expected = truth(token_weights=exact, **options)(*[v.double() for v in half], *rows)
    mine, theirs = torch.autograd.grad(found, weights)[0].double(), torch.autograd.grad(expected, exact)[0]
    assert theirs[zero] != 0
    assert (mine - theirs).norm() <= 8 * torch.finfo(torch.float16).eps * theirs.norm()


@pytest.mark.parametrize("entropy", [None, 0.0, 3.0])
def test_a_small_weight_in_fp16(entropy):
    """The gradients of logits at 1e-7 would flush to zero; a weight of all tokens scales them."""
    hidden, weight, labels, old, advantages = batch(torch.float32)
    half = hidden.detach().half().requires_grad_()
    weights, options, exactly = torch.full((B, S), 1e-7), {}, {}
    if entropy is not None:
        options = {"entropy_coefficient": 0.1, "entropy_weights": entropy * weights}
        exactly = {"entropy_coefficient": 0.1, "entropy_weights": torch.full((B, S), entropy, dtype=torch.float64)}
    found = linear_policy_loss(half, weight.detach().half(), labels, old, advantages, token_weights=weights, **options)
    (mine,) = torch.autograd.grad(found.loss / 1e-7, half)
    exact = [half.detach().double().requires_grad_(), weight.detach().half().double()]
    rows = (labels, old.double(), advantages.double())
    expected = truth(token_weights=torch.ones(B, S, dtype=torch.float64), **exactly)(*exact, *rows)
    (theirs,) = torch.autograd.grad(expected, exact[0])
    assert (mine.double() - theirs).norm() <= 8 * torch.finfo(torch.float16).eps * theirs.norm()


@pytest.mark.parametrize("importance", ["token", "sequence"])
def test_invalid_labels_are_nan_where_they_are_not_read(importance):
    hidden, weight, labels, old, advantages = batch()
    labels[0, 0] = VOCAB + 3
    run = torch.compile(
        lambda h: linear_policy_loss(h, weight, labels, old, advantages, importance=importance),
        backend="eager",
        fullgraph=True,
    )
    found = run(hidden)
    assert found.loss.isnan()
    assert found.logprob.isnan().nonzero().tolist() == [[0, 0]]
    assert found.metrics.ratio_mean.isnan()


def test_what_is_logged_has_no_gradient():
    logprob = torch.tensor([[-1.0, -2.0, -3.0]])
    old, ours = logprob.clone().requires_grad_(), logprob.clone().requires_grad_()
    found = policy_loss(ours, old, torch.ones(1, 3), importance="sequence")
    found.loss.backward()
    assert old.grad is None
    assert not any(value.requires_grad for value in found.metrics if value is not None)


def test_clipped_is_what_the_loss_clips():
    """A sequence's ratio is 1 where its tokens' are not."""
    logprob = torch.tensor([[-1.0, -2.0, -3.0]])
    old = logprob + torch.tensor([[0.3, -0.3, 0.0]])
    options = {"clip_low": 0.01, "clip_high": 0.01}
    for sign in (-1, 1):
        of_sequence = policy_loss(logprob, old, sign * torch.ones(1, 3), importance="sequence", **options).metrics
        assert of_sequence.clipped_low == of_sequence.clipped_high == 0
    of_tokens = policy_loss(logprob, old, torch.tensor([[-1.0, 1.0, 1.0]]), **options).metrics
    torch.testing.assert_close((of_tokens.clipped_low, of_tokens.clipped_high), (torch.tensor(1 / 3),) * 2)


def test_padding_is_of_no_sequence():
    logprob, advantages = torch.tensor([[-1.0, -2.0, -3.0]] * 2), torch.ones(2, 3)
    mask, segments = torch.tensor([[1, 1, 0]] * 2), torch.tensor([[0, 0, -1], [1, 1, -1]])
    options = {"importance": "sequence", "mask": mask}
    found = policy_loss(logprob, logprob - 0.1, advantages, segment_ids=segments, **options)
    torch.testing.assert_close(found, policy_loss(logprob, logprob - 0.1, advantages, **options))
    torch.testing.assert_close(
        make_token_weights(mask, "sequence_mean", segment_ids=segments), make_token_weights(mask, "sequence_mean")
    )


def test_half_precision_is_computed_in_single():
    logprob = torch.tensor([-1.0, -2.0]).half()
    found = policy_loss(logprob, logprob, torch.ones(2), entropy_coefficient=torch.tensor(0.0))
    assert found.loss.dtype == found.metrics.ratio_mean.dtype == found.logprob.dtype == torch.float32


def test_counts_that_change_compile_nothing():
    def weights(mask, count):
        return make_token_weights(mask, num_tokens=count)

    for count in range(3, 20):
        torch.testing.assert_close(weights(torch.ones(7), count), torch.full((7,), 1 / count))
    assert count_graphs(weights, [(torch.ones(7), count) for count in range(3, 20)]) == 2
    with pytest.raises(ValueError, match=r"^num_tokens: expected a number >= 0, got -4"):
        make_token_weights(torch.ones(3), num_tokens=-4)
