"""`max_label_tokens`: the losses and gradients of all tokens, for the price of those that count."""

import functools

import cases
import pytest
import torch
from comparing import TIGHT, assert_matches
from gpu_cases import linear

import compiled_loss
from compiled_loss import Chunking, reference
from compiled_loss.testing import assert_label_tokens_fit, assert_single_graph, count_graphs, head_inputs

N, H, V = 29, 7, 17
COUNTING = 11


_random = torch.Generator().manual_seed(5)
TEACHER = tuple(torch.randn(rows, 5, generator=_random, dtype=torch.float64) for rows in (N, V))


def given(counting=COUNTING, seed=0):
    """Of N tokens, so many count; weights that differ, so that a token in another's place shows."""
    inputs = head_inputs(N, H, V, dtype=torch.float64, seed=seed)
    random = torch.Generator().manual_seed(seed)
    masked = torch.randperm(N, generator=random)[counting:]
    labels = inputs.labels.clone()
    labels[masked] = -100
    weights = torch.linspace(0.3, 2, N, dtype=torch.float64).requires_grad_()
    return inputs.hidden, inputs.weight, inputs.bias, weights, labels


def cross_entropy(reduction, strategy):
    def loss(where, h, w, b, t, y, **how):
        options = {"bias": b, "token_weights": t, "label_smoothing": 0.1, "z_loss": 0.01, "reduction": reduction}
        return where.linear_cross_entropy(h, w, y, **options, **how)

    return loss, {"strategy": strategy, "chunk_size": 5 if strategy == "tokens" else 9}


def statistics(where, h, w, b, t, y, **how):
    logprob, lse, entropy, correct, *_ = where.linear_token_statistics(h, w, y, bias=b, **how)
    return (logprob + 2 * lse + 3 * entropy) * t + correct


def distillation(**options):
    def loss(where, h, w, b, t, y, **how):
        return where.linear_distillation(h, w, *TEACHER, y, **options, **how)

    return loss, {"chunk_size": 5}


def cached(where, h, w, b, t, y, **how):
    hidden, weight = TEACHER
    top = (hidden @ weight.t()).log_softmax(-1).topk(4)
    return where.linear_distillation(h, w, None, None, y, teacher_topk=tuple(top), hard_label_weight=0.3, **how)


def soft(where, h, w, b, t, y, **how):
    hidden, weight = TEACHER
    return where.linear_soft_cross_entropy(h, w, (y != -100) * 0.5, teacher_hidden=hidden, teacher_weight=weight, **how)


def probabilities(where, h, w, b, t, y, **how):
    hidden, weight = TEACHER
    target = (hidden @ weight.t()).softmax(-1)
    return where.linear_soft_cross_entropy(h, w, (y != -100).unsqueeze(-1), target_probs=target, **how)


def depths(where, h, w, b, t, y, **how):
    return where.multi_token_prediction([h, 2 * h], w, y, targets=[y, y.flip(0)], **how)


LOSSES = {
    "tokens": cross_entropy("mean", "tokens"),
    "vocab": cross_entropy("sum", "vocab"),
    "none": cross_entropy("none", "vocab"),
    "statistics": (statistics, {"strategy": "vocab", "chunk_size": 9}),
    "distillation": distillation(divergence="jsd", temperature=0.7, hard_label_weight=0.4),
    "distillation, none": distillation(divergence="reverse_kl", reduction="none"),
    "cached teacher": (cached, {"chunk_size": 5}),
    "soft": (soft, {"chunk_size": 5}),
    "probabilities": (probabilities, {"chunk_size": 5}),
    "multi-token": (depths, {"chunk_size": 5}),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("most", [COUNTING, COUNTING / N, 20], ids=["exact", "fraction", "room"])
def test_max_label_tokens_matches_reference(name, most):
    loss, how = LOSSES[name]
    call = functools.partial(loss, compiled_loss, chunking=Chunking(**how, max_label_tokens=most))
    assert_matches(call, functools.partial(loss, reference), given())


@pytest.mark.parametrize(
    "name",
    ["tokens", *(pytest.param(n, marks=pytest.mark.slow) for n in LOSSES if n != "tokens")],
)
def test_compiled_matches_reference(name):
    loss, how = LOSSES[name]
    call = functools.partial(loss, compiled_loss, chunking=Chunking(**how, max_label_tokens=COUNTING))
    assert_matches(torch.compile(call, fullgraph=True), functools.partial(loss, reference), given())


@pytest.mark.parametrize("keywords", cases.KEYWORDS)
def test_every_keyword(keywords):
    """Masks, shifts and other ignored labels decide what counts, not the labels alone."""
    options = cases.KEYWORDS[keywords](N, V)
    inputs = cases.inputs_for(options, N, H, V)
    call = cases.linear(Chunking(strategy="vocab", chunk_size=5, max_label_tokens=N - 1), **options)
    for seed in range(3):
        labels = inputs.labels.roll(seed)
        labels[0] = options.get("ignore_index", -100)
        assert_matches(call, cases.truth(**options), inputs._replace(labels=labels))


@pytest.mark.parametrize("counting", [0, 1, N - 1, N])
@pytest.mark.parametrize("name", ["tokens", "none", "distillation"])
def test_no_one_and_all_label_tokens(name, counting):
    loss, how = LOSSES[name]
    inputs = given(counting)
    for most in (1, 0.01) if counting < 2 else (N, 1.0, 10 * N) if counting == N else (N - 1,):
        call = functools.partial(loss, compiled_loss, chunking=Chunking(**how, max_label_tokens=most))
        assert_matches(call, functools.partial(loss, reference), inputs)


FIRST = ("tokens", "none")


@pytest.mark.parametrize("name", [n if n in FIRST else pytest.param(n, marks=pytest.mark.slow) for n in LOSSES])
def test_too_many_label_tokens_is_an_error_or_nan(name):
    """Eager CPU code raises; traced code makes the loss and the gradients of the head NaN."""
    loss, how = LOSSES[name]
    call = functools.partial(loss, compiled_loss, chunking=Chunking(**how, max_label_tokens=COUNTING - 1))
    inputs = given()
    with pytest.raises(
        ValueError, match=r"max_label_tokens: expected at least \d+, for so many of \d+ tokens count, got"
    ):
        call(*inputs)
    value = torch.compile(call, fullgraph=True, backend="aot_eager")(*inputs)
    d_hidden, d_weight = torch.autograd.grad(value, inputs[:2], torch.ones_like(value))
    assert value.isnan().all() if value.dim() == 0 else value[inputs[4] != -100].isnan().all()
    assert d_weight.isnan().all()
    assert d_hidden[inputs[4] != -100].isnan().all()


def test_one_graph_as_label_tokens_vary():
    """Counts and places change from step to step, and N with a fraction of it."""
    call = functools.partial(LOSSES["vocab"][0], compiled_loss)
    chunking = Chunking(strategy="vocab", chunk_size=9, max_label_tokens=0.7)
    call = functools.partial(call, chunking=chunking)
    assert count_graphs(call, [given(counting, seed) for seed, counting in enumerate((3, 20, 11))]) == 1


def lengths():
    for tokens in (29, 23, 19, 26):
        hidden, weight, bias, weights, labels = given()
        rows = (v[:tokens].detach().requires_grad_(v.is_floating_point()) for v in (hidden, weights, labels))
        hidden, weights, labels = rows
        yield hidden, weight, bias, weights, labels


def test_one_graph_as_n_varies():
    """A fraction of N is symbolic, and the fraction itself no input of the graph."""
    call, how = LOSSES["vocab"]
    call = functools.partial(call, compiled_loss, chunking=Chunking(**how, max_label_tokens=0.7))
    assert count_graphs(call, list(lengths()), dynamic=True) == 1


def test_one_compiled_function_of_two_fractions():
    def call(chunking, *inputs):
        return LOSSES["tokens"][0](compiled_loss, *inputs, chunking=chunking)

    compiled = torch.compile(call, fullgraph=True, backend="eager")
    expected = LOSSES["tokens"][0](reference, *given())
    for part in (0.6, 0.7, 0.8):
        torch.testing.assert_close(compiled(Chunking(max_label_tokens=part), *given()), expected, **TIGHT)


def test_vmap_of_grad():
    hidden, *rest = (v.detach() for v in given())
    batch = torch.stack([hidden, 2 * hidden])
    call = functools.partial(LOSSES["tokens"][0], compiled_loss, chunking=Chunking(max_label_tokens=COUNTING))
    plain = functools.partial(LOSSES["tokens"][0], reference)
    found, expected = (
        torch.func.vmap(torch.func.grad(f, (0, 1)), in_dims=(0, None, None, None, None))(batch, *rest)
        for f in (call, plain)
    )
    torch.testing.assert_close(found, expected, **TIGHT)


def test_jacfwd_and_hessian():
    hidden, *rest = (v.detach() for v in given())
    call = functools.partial(LOSSES["tokens"][0], compiled_loss, chunking=Chunking(max_label_tokens=COUNTING))
    plain = functools.partial(LOSSES["tokens"][0], reference)
    for transform in (torch.func.jacfwd, torch.func.hessian):
        found, expected = (transform(lambda h, f=f: f(h, *rest))(hidden) for f in (call, plain))
        torch.testing.assert_close(found, expected, **TIGHT)


def test_default_dtype_does_not_matter():
    hidden, weight, _, _, labels = given()
    torch.set_default_dtype(torch.float64)
    try:
        loss = compiled_loss.linear_cross_entropy(
            hidden.float(), weight.float(), labels, chunking=Chunking(max_label_tokens=COUNTING)
        )
    finally:
        torch.set_default_dtype(torch.float32)
    assert loss.dtype == torch.float32


@pytest.mark.parametrize("strategy", ["tokens", pytest.param("vocab", marks=pytest.mark.slow)])
@pytest.mark.xdist_group(name="GPU code")
def test_masked_tokens_cost_no_gemm(inspected, strategy):
    """GPU code: a quarter of the operations and no synchronisation, for a copy of the hidden states that count."""
    tokens, width, vocab = 8192, 4096, 131072
    case = linear(strategy, (tokens // 4, width, vocab), 4, size=512 if strategy == "tokens" else None)
    chunking = case.call.keywords["chunking"]
    chunking = Chunking(
        strategy=strategy, chunk_size=chunking.chunk_size, accumulate_dtype=torch.bfloat16, max_label_tokens=0.25
    )
    call = functools.partial(compiled_loss.linear_cross_entropy, chunking=chunking)
    inputs = [f"bf16[{tokens},{width}]:grad", *case.inputs[1:2], f"int64[{tokens}]:-100..{vocab - 1}"]
    found = inspected(call, *inputs, assemble=False)
    assert_single_graph(found)
    assert not [x for p in found.passes for x in p.launches if x.kind in ("sync", "transfer")]
    unit = 2 * tokens // 4 * width * vocab
    operations = [p.operations / unit for p in found.passes]
    assert operations == pytest.approx([case.forward, case.backward], rel=0.01, abs=0.01)
    moved = 2 * (tokens // 4) * width  # the hidden states that count
    whole = case.outputs + 2 * (tokens - tokens // 4) * width  # the gradient of all
    assert found.forward.peak_bytes <= 1.05 * (case.keeps + case.chunk + moved) + 64 * tokens + 16 * vocab
    assert found.peak_bytes <= 1.05 * (whole + case.chunk + moved) + 64 * tokens + 16 * vocab


def test_assert_label_tokens_fit():
    *_, labels = given()
    assert_label_tokens_fit(labels, Chunking(max_label_tokens=COUNTING))
    assert_label_tokens_fit(labels, Chunking())
    with pytest.raises(AssertionError, match=f"{COUNTING} of {N} tokens count, and max_label_tokens=0.1 computes 3"):
        assert_label_tokens_fit(labels, Chunking(max_label_tokens=0.1))
    with pytest.raises(AssertionError, match="of 29 tokens count"):
        assert_label_tokens_fit(labels, Chunking(max_label_tokens=3), mask=labels != labels.max())
    assert_label_tokens_fit(labels, Chunking(max_label_tokens=3), mask=torch.zeros(N))
    shifted = torch.tensor([1, 2, -100, -100])
    assert_label_tokens_fit(shifted, Chunking(max_label_tokens=1), shift=1)
    assert_label_tokens_fit(shifted, Chunking(max_label_tokens=1), shift=9)
