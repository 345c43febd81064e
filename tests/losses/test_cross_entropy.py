"""Numbers: every keyword, every strategy in eager code, against the fp64 reference and torch's own cross_entropy."""

from functools import partial

import cases
import pytest
import torch
from comparing import TIGHT, assert_matches
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import compiled_loss
from compiled_loss import Chunking, cross_entropy, linear_cross_entropy, reference
from compiled_loss.testing import head_inputs


@pytest.mark.parametrize("strategy", cases.CHUNKINGS)
@pytest.mark.parametrize("name", cases.KEYWORDS)
@pytest.mark.parametrize(("tokens", "width", "vocab"), [(23, 7, 29), (1, 3, 2), (4, 2, 1)])
def test_linear_cross_entropy_matches_reference(strategy, name, tokens, width, vocab):
    keywords = cases.KEYWORDS[name](tokens, vocab)
    inputs, truth = cases.inputs_for(keywords, tokens, width, vocab), cases.truth(**keywords)
    assert_matches(cases.linear(cases.chunking_of(strategy, keywords), **keywords), truth, inputs)
    with torch.no_grad():
        torch.testing.assert_close(
            cases.linear(cases.CHUNKINGS[strategy], **keywords)(*inputs), truth(*inputs), **TIGHT
        )


@pytest.mark.parametrize("name", cases.KEYWORDS)
@pytest.mark.parametrize("tokens", [1, 5, 13, 16])  # of chunks of 5: one row, one chunk, ragged, a last one of one row
@pytest.mark.parametrize("strategy", ["tokens", "vocab"])
def test_ragged_and_single_chunks_match_reference(name, strategy, tokens):
    keywords = cases.KEYWORDS[name](tokens, 29)
    loss = cases.linear(cases.chunking_of(strategy, keywords), **keywords)
    assert_matches(loss, cases.truth(**keywords), cases.inputs_for(keywords, tokens, 7, 29))


@pytest.mark.parametrize("name", cases.KEYWORDS)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced", "expanded"])
def test_cross_entropy_matches_reference(name, layout):
    keywords = cases.KEYWORDS[name](5, 29)
    logits = {
        "contiguous": lambda: torch.randn(3, 5, 29, dtype=torch.float64),
        "transposed": lambda: torch.randn(5, 3, 29, dtype=torch.float64).transpose(0, 1),
        "sliced": lambda: torch.randn(3, 6, 31, dtype=torch.float64)[:, :-1, 1:-1],
        "expanded": lambda: torch.randn(1, 5, 29, dtype=torch.float64).expand(3, 5, 29),
    }[layout]().requires_grad_()
    labels = torch.randint(0, 29, (5, 3)).t()
    labels = torch.where(torch.rand(3, 5) < 0.2, keywords.get("ignore_index", -100), labels)
    assert_matches(partial(cross_entropy, **keywords), partial(reference.cross_entropy, **keywords), (logits, labels))


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("weighted", [False, True])
def test_reference_is_torch_cross_entropy(reduction, smoothing, weighted):
    logits, labels = torch.randn(31, 17, dtype=torch.float64), torch.randint(0, 17, (31,))
    labels[::4] = -100
    weight = torch.rand(17, dtype=torch.float64) if weighted else None
    expected = F.cross_entropy(logits, labels, weight=weight, label_smoothing=smoothing, reduction=reduction)
    actual = reference.cross_entropy(
        logits, labels, class_weights=weight, label_smoothing=smoothing, reduction=reduction
    )
    torch.testing.assert_close(actual, expected, **TIGHT)


def test_hand_computed_values():
    """softmax of (0, log 3) is (1/4, 3/4)."""
    logits = torch.tensor([[0.0, 3.0]]).log().clamp(min=0.0)
    logits[0, 1] = torch.tensor(3.0).log()
    assert cross_entropy(logits, torch.tensor([0])).item() == pytest.approx(1.3862943611198906)  # log 4
    smoothed = cross_entropy(logits, torch.tensor([0]), label_smoothing=0.5).item()
    assert smoothed == pytest.approx(0.5 * 1.3862943611198906 + 0.25 * (1.3862943611198906 + 0.28768207245178085))
    squared = cross_entropy(logits, torch.tensor([0]), z_loss=0.1).item()
    assert squared == pytest.approx(1.3862943611198906 + 0.1 * 1.3862943611198906**2)


@pytest.mark.parametrize("shape", [(), (1,), (6,), (2, 3), (2, 1, 3), (0,), (2, 0)])
@pytest.mark.parametrize("strategy", cases.CHUNKINGS)
def test_leading_shapes(shape, strategy):
    hidden = torch.randn(*shape, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 11, shape)
    loss = linear_cross_entropy(hidden, weight, labels, chunking=cases.CHUNKINGS[strategy])
    torch.testing.assert_close(loss, reference.linear_cross_entropy(hidden, weight, labels), **TIGHT)
    loss.backward()
    assert hidden.grad.shape == hidden.shape
    assert torch.isfinite(weight.grad).all()
    none = linear_cross_entropy(hidden, weight, labels, reduction="none")
    assert none.shape == shape
    logits = (hidden @ weight.t()).detach().requires_grad_()
    torch.testing.assert_close(cross_entropy(logits, labels), loss, **TIGHT)
    assert cross_entropy(logits, labels, reduction="none").shape == shape


def test_non_contiguous_hidden_and_weight():
    hidden = torch.randn(4, 5, 6, dtype=torch.float64).permute(1, 2, 0).requires_grad_()  # [5, 6, 4], width strided
    weight = torch.randn(4, 11, dtype=torch.float64).t().requires_grad_()
    labels = torch.randint(0, 11, (6, 5)).t()
    for chunking in cases.CHUNKINGS.values():
        loss = partial(linear_cross_entropy, chunking=chunking)
        assert_matches(loss, reference.linear_cross_entropy, (hidden, weight, labels))


@pytest.mark.parametrize("strategy", cases.CHUNKINGS)
def test_all_ignored_is_zero_and_attached(strategy):
    inputs = head_inputs(9, 4, 7, ignored=1.0)
    for keywords in (
        {},
        {"z_loss": 0.1},
        {"class_weights": torch.zeros(7)},
        {"reduction": "sum", "num_label_tokens": 0},
    ):
        loss = cases.linear(cases.CHUNKINGS[strategy], **keywords)(*inputs)
        assert loss.item() == 0
        assert all((gradient == 0).all() for gradient in cases.gradients(loss, inputs))


@pytest.mark.parametrize("strategy", ["tokens", "vocab"])
def test_no_tokens_is_zero_and_attached(strategy):
    inputs = head_inputs(0, 7, 29, dtype=torch.float64)
    loss = cases.linear(cases.CHUNKINGS[strategy])(*inputs)
    assert loss == 0
    assert not any(gradient.any() for gradient in cases.gradients(loss, inputs))


@pytest.mark.parametrize("strategy", cases.CHUNKINGS)
def test_nan_in_ignored_tokens(strategy):
    inputs = head_inputs(9, 4, 7)
    labels = inputs.labels.clone()
    labels[2] = -100
    broken = inputs.hidden.detach().clone()
    broken[2] = float("nan")
    expected = linear_cross_entropy(inputs.hidden, inputs.weight, labels)
    torch.testing.assert_close(
        linear_cross_entropy(broken, inputs.weight, labels, chunking=cases.CHUNKINGS[strategy]), expected
    )
    logits = broken @ inputs.weight.t()
    torch.testing.assert_close(cross_entropy(logits, labels), expected)


@pytest.mark.parametrize("strategy", cases.CHUNKINGS)
def test_bias_of_minus_inf_forbids_classes(strategy):
    """A bias of -inf takes a column out of the vocabulary, as constrained decoding does."""
    inputs = head_inputs(9, 4, 30, dtype=torch.float64)
    bias = torch.zeros(30, dtype=torch.float64)
    bias[10:] = float("-inf")
    labels = inputs.labels % 10

    def truth(hidden, weight, labels):
        return reference.linear_cross_entropy(hidden, weight[:10], labels)

    for fn in (partial(linear_cross_entropy, chunking=cases.CHUNKINGS[strategy]), reference.linear_cross_entropy):
        assert_matches(partial(fn, bias=bias), truth, (*inputs[:2], labels))


@pytest.mark.parametrize("strategy", cases.CHUNKINGS)
def test_logits_of_finfo_min(strategy):
    """The usual fill of a mask: a row of nothing else is a uniform distribution."""
    least = torch.finfo(torch.float32).min
    hidden, weight, labels = torch.ones(3, 1), torch.full((11, 1), least), torch.tensor([0, 5, 10])
    loss = linear_cross_entropy(hidden, weight, labels, chunking=cases.CHUNKINGS[strategy])
    torch.testing.assert_close(loss, torch.tensor(11.0).log())
    torch.testing.assert_close(cross_entropy(hidden @ weight.t(), labels), torch.tensor(11.0).log())
    statistics = compiled_loss.linear_token_statistics(hidden, weight, labels, chunking=cases.CHUNKINGS[strategy])
    torch.testing.assert_close(statistics.entropy, torch.full((3,), 11.0).log())
    assert statistics.correct.all()


@pytest.mark.parametrize("strategy", cases.CHUNKINGS)
def test_token_weights_are_differentiable(strategy):
    inputs = head_inputs(11, 4, 23, dtype=torch.float64, ignored=0.2)
    weights = torch.rand(11, dtype=torch.float64).requires_grad_()
    keywords = {"token_weights": weights, "z_loss": 0.1, "label_smoothing": 0.1}
    loss, truth = cases.linear(cases.CHUNKINGS[strategy], **keywords), cases.truth(**keywords)
    assert_matches(loss, truth, inputs, wanted=[weights])


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 40),
    vocab=st.integers(1, 40),
    rows=st.integers(1, 45),
    columns=st.integers(1, 45),
    seed=st.integers(0, 1000),
)
def test_any_chunk_size_matches_reference(tokens, vocab, rows, columns, seed):
    inputs = head_inputs(tokens, 3, vocab, dtype=torch.float64, ignored=0.1, ignore_index=1, seed=seed)
    keywords = cases.everything(tokens, vocab, seed=seed)
    for chunking in (Chunking(strategy="tokens", chunk_size=rows), Chunking(strategy="vocab", chunk_size=columns)):
        assert_matches(cases.linear(chunking, **keywords), cases.truth(**keywords), inputs)


@settings(max_examples=20, deadline=None)
@given(tokens=st.integers(1, 30), seed=st.integers(0, 1000))
def test_order_doubling_and_masking_of_tokens(tokens, seed):
    """Order does not matter; twice the tokens is twice the sum; a mask is the same as tokens left out."""
    hidden, weight, labels, _ = head_inputs(tokens, 3, 13, dtype=torch.float64, seed=seed)
    random = torch.Generator().manual_seed(seed)
    order = torch.randperm(tokens, generator=random)
    keep = torch.rand(tokens, generator=random) < 0.6
    for chunking in cases.CHUNKINGS.values():
        total = linear_cross_entropy(hidden, weight, labels, reduction="sum", chunking=chunking)
        shuffled = linear_cross_entropy(hidden[order], weight, labels[order], reduction="sum", chunking=chunking)
        torch.testing.assert_close(shuffled, total, **TIGHT)
        doubled = linear_cross_entropy(
            torch.cat([hidden, hidden]), weight, torch.cat([labels, labels]), reduction="sum", chunking=chunking
        )
        torch.testing.assert_close(doubled, 2 * total, **TIGHT)
        masked = linear_cross_entropy(hidden, weight, labels, mask=keep, chunking=chunking)
        removed = linear_cross_entropy(hidden[keep], weight, labels[keep], chunking=chunking)
        torch.testing.assert_close(masked, removed, **TIGHT)


@pytest.mark.parametrize("strategy", ["vocab", "default"])
def test_linear_token_statistics_match_reference(strategy):
    inputs = head_inputs(23, 7, 29, dtype=torch.float64, ignored=0.2, confident=0.3)
    keywords = {"mask": torch.arange(23) % 5 != 0, "softcap": 9.0, "temperature": 0.8, "shift": 1}

    def statistics(lib, inputs, **how):
        return lib.linear_token_statistics(*inputs[:3], bias=inputs[3], **keywords, **how)

    for which in (slice(3), 0, 1, 2):  # together and each alone
        assert_matches(
            lambda *i, which=which: statistics(compiled_loss, i, chunking=cases.CHUNKINGS[strategy])[which],
            lambda *i, which=which: statistics(reference, i)[which],
            inputs,
            rtol=1e-10,
            atol=1e-11,
        )
    expected = statistics(reference, inputs)
    found = statistics(compiled_loss, inputs, chunking=cases.CHUNKINGS[strategy])
    torch.testing.assert_close(found, expected, **TIGHT)
    with torch.no_grad():
        for chunking in cases.CHUNKINGS.values():
            torch.testing.assert_close(statistics(compiled_loss, inputs, chunking=chunking), expected, **TIGHT)


@pytest.mark.parametrize("strategy", cases.CHUNKINGS)
def test_linear_cross_entropy_with_statistics(strategy):
    inputs = head_inputs(23, 7, 29, dtype=torch.float64, ignored=0.2)
    loss, statistics = compiled_loss.linear_cross_entropy_with_statistics(
        *inputs[:3], bias=inputs.bias, z_loss=0.1, chunking=cases.CHUNKINGS[strategy]
    )
    torch.testing.assert_close(loss, cases.linear(cases.CHUNKINGS[strategy], z_loss=0.1)(*inputs))
    truth = reference.linear_token_statistics(*inputs[:3], bias=inputs.bias)
    torch.testing.assert_close(statistics, truth, **TIGHT)
    assert not any(v.requires_grad for v in statistics if v is not None)
    assert all(g is not None for g in cases.gradients(loss, inputs))


def test_correct_counts_ties():
    hidden, weight = torch.ones(2, 1), torch.tensor([[1.0], [1.0], [0.0]])
    statistics = compiled_loss.linear_token_statistics(hidden, weight, torch.tensor([1, 2]))
    assert statistics.correct.tolist() == [True, False]


@pytest.mark.parametrize("strategy", ["tokens", "vocab"])
def test_logits_far_above_the_softcap(strategy):
    inputs = head_inputs(13, 7, 29, dtype=torch.float64)
    hidden = (1000 * inputs.hidden.detach()).requires_grad_()
    loss = partial(linear_cross_entropy, softcap=5.0, chunking=Chunking(strategy=strategy, chunk_size=4))
    truth = partial(reference.linear_cross_entropy, softcap=5.0)
    torch.testing.assert_close(loss(hidden, *inputs[1:3]), truth(hidden, *inputs[1:3]), **TIGHT)
    assert_matches(loss, truth, (hidden, *inputs[1:3]), rtol=1e-9, atol=1e-12)
