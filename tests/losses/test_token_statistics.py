"""Statistics of logits that exist: the specification's numbers and gradients, one pass each way, nothing kept."""

from functools import partial

import pytest
import torch
from comparing import TIGHT, assert_matches
from torch.autograd.graph import saved_tensors_hooks

from compiled_loss import Chunking, linear_token_statistics, reference, token_statistics
from compiled_loss.engine.math.statistics import NAMES
from compiled_loss.testing import head_inputs

KEYWORDS = {
    "plain": {},
    "everything": {
        "mask": torch.tensor([1, 0, 1, 2, 1]),
        "softcap": 9.0,
        "temperature": 0.8,
        "shift": 1,
        "ignore_index": 1,
    },
}


def assert_as_the_reference(statistics, logits, labels, **keywords):
    """All statistics together, and each alone."""
    truth = partial(reference.token_statistics, **keywords)
    assert_matches(statistics, truth, (logits, labels))
    for i in range(3):
        assert_matches(lambda *v, i=i: statistics(*v)[i], lambda *v, i=i: truth(*v)[i], (logits, labels))


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced", "one row"])
@pytest.mark.parametrize("name", KEYWORDS)
def test_token_statistics_match_reference(name, layout):
    logits = {
        "contiguous": lambda: torch.randn(3, 5, 29, dtype=torch.float64),
        "transposed": lambda: torch.randn(5, 3, 29, dtype=torch.float64).transpose(0, 1),
        "sliced": lambda: torch.randn(3, 6, 31, dtype=torch.float64)[:, :-1, 1:-1],
        "one row": lambda: torch.randn(5, 1, dtype=torch.float64)[None],
    }[layout]().requires_grad_()
    labels = torch.randint(0, logits.shape[-1], logits.shape[:-1])
    labels[..., 2] = -100 if name == "plain" else 1
    assert_as_the_reference(partial(token_statistics, **KEYWORDS[name]), logits, labels, **KEYWORDS[name])


def test_token_statistics_match_linear_token_statistics():
    hidden, weight, labels, _ = head_inputs(11, 5, 17, dtype=torch.float64, confident=0.3, ignored=0.2)
    theirs = linear_token_statistics(hidden, weight, labels, softcap=4.0)
    torch.testing.assert_close(token_statistics(hidden @ weight.t(), labels, softcap=4.0), theirs, **TIGHT)


def test_labels_out_of_range():
    logits = torch.randn(3, 5)
    with pytest.raises(ValueError, match=r"^labels: expected 0 <= label < V = 5, or ignore_index = -100, got 5"):
        token_statistics(logits, torch.tensor([0, 5, 1]))
    run = torch.compile(token_statistics, fullgraph=True, backend="eager")
    statistics = run(logits, torch.tensor([0, 5, 1]))
    for values in statistics[:3]:
        assert values.isnan().tolist() == [False, True, False]
    assert not statistics.correct[1]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", KEYWORDS)
def test_compiled(name, backend):
    logits, labels = torch.randn(3, 5, 29, dtype=torch.float64, requires_grad=True), torch.randint(0, 29, (3, 5))
    run = torch.compile(lambda z, y: token_statistics(z, y, **KEYWORDS[name]), fullgraph=True, backend=backend)
    assert_as_the_reference(run, logits, labels, **KEYWORDS[name])


@pytest.mark.parametrize("backend", [None, "aot_eager_decomp_partition"])
def test_saved_tensors_are_the_input(backend):
    logits, labels = torch.randn(2, 50, 12, requires_grad=True), torch.randint(0, 50, (2, 12))

    def entropies(logits, labels):
        return token_statistics(logits, labels, class_dim=1, softcap=3.0).entropy

    run = entropies if backend is None else torch.compile(entropies, fullgraph=True, backend=backend)
    kept = []
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        run(logits, labels).sum()
    mine = logits.untyped_storage().data_ptr()
    assert [t.shape for t in kept if t.numel() >= logits.numel() and t.untyped_storage().data_ptr() != mine] == []
    assert any(t.untyped_storage().data_ptr() == mine for t in kept)


def test_torch_func_transforms():
    logits, labels = torch.randn(3, 5, dtype=torch.float64), torch.tensor([0, 4, -100])
    for transform in (torch.func.grad, torch.func.hessian):
        for i in range(3):
            mine, theirs = (
                transform(lambda z, lib=lib, i=i: lib(z, labels)[i].sum())(logits)
                for lib in (token_statistics, reference.token_statistics)
            )
            torch.testing.assert_close(mine, theirs, **TIGHT)


EVERY = NAMES


def of_form(form, hidden, weight, labels, wanted):
    """The statistics of logits, or of a head by one of the strategies; that of tokens without a gradient."""
    keywords = {"softcap": 3.0, "wanted": wanted}
    if form == "logits":
        return token_statistics(hidden @ weight.t(), labels, **keywords)
    if form == "tokens":
        hidden, weight = hidden.detach(), weight.detach()
    return linear_token_statistics(
        hidden, weight, labels, chunking=Chunking(strategy=form, chunk_size=4, max_label_tokens=10), **keywords
    )


NAMES = ("mean_logit", "log_sum_sq_probs", "first_argmax", "all")


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        *[(name, None) for name in NAMES],
        ("all", "aot_eager"),
        *[pytest.param(name, "aot_eager", marks=pytest.mark.slow) for name in NAMES[:-1]],
        *[pytest.param(name, "inductor", marks=pytest.mark.slow) for name in NAMES],
    ],
)
@pytest.mark.parametrize("form", ["logits", "tokens", "vocab"])
def test_what_is_wanted(form, name, backend):
    """The statistics that the default lacks, alone and all together; None for the rest."""
    hidden, weight, labels, _ = head_inputs(11, 5, 17, dtype=torch.float64, ignored=0.2)
    names = EVERY if name == "all" else (name, "logprob")

    def truth(hidden, weight):
        return reference.linear_token_statistics(hidden, weight, labels, softcap=3.0, wanted=names)

    def run(hidden, weight):
        return of_form(form, hidden, weight, labels, names)

    if backend is not None:
        run = torch.compile(run, fullgraph=True, backend=backend)
    if form == "tokens":
        found, expected = run(hidden, weight), truth(hidden, weight)
        assert [v is None for v in found] == [v is None for v in expected]
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, None if theirs is None else theirs.detach(), **TIGHT)
    else:
        assert_matches(run, truth, (hidden, weight))


def test_errors_of_wanted():
    many = torch.zeros(1).expand(1, 2**24 + 1)
    with pytest.raises(ValueError, match=r"^wanted: expected no 'first_argmax' of more than 16777216 classes, got V ="):
        token_statistics(many, torch.tensor([0]), wanted=("first_argmax",))
    logits, labels = torch.zeros(2, 3), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"^wanted: expected some of 'logprob', .*got 'perplexity'"):
        token_statistics(logits, labels, wanted=("perplexity",))
    with pytest.raises(TypeError, match=r"^wanted: expected some of .* in a tuple, got 'entropy'"):
        token_statistics(logits, labels, wanted="entropy")


@pytest.mark.parametrize("form", ["logits", "tokens", "vocab"])
def test_the_first_of_equal_logits(form):
    """In another chunk than its equal, behind the label, before it, and where all are equal."""
    weight = torch.tensor([[0.0], [2.0], [1.0], [0.0], [0.0], [0.0], [2.0], [0.0], [2.0]])
    hidden, labels = torch.tensor([[1.0], [1.0], [1.0], [0.0], [-1.0]]), torch.tensor([0, 8, 1, 5, 3])
    found = of_form(form, hidden, weight, labels, ("first_argmax", "correct"))
    assert found.first_argmax.tolist() == [1, 1, 1, 0, 0]
    assert found.correct.tolist() == [False, True, True, True, True]


@pytest.mark.parametrize("form", ["logits", "tokens", "vocab"])
@pytest.mark.parametrize("margin", [3.0, 12.0, 30.0, 60.0])
def test_the_sum_of_squares_of_a_confident_token_keeps_its_digits(form, margin):
    """About -2 (V - 1) exp(-margin), which in fp32 is lost in 1 - p past 16 nats."""
    logits = torch.zeros(1, 7, dtype=torch.float64)
    logits[0, 4] = margin
    others = 6 * torch.exp(torch.tensor(-margin, dtype=torch.float64))
    squares = others * torch.exp(torch.tensor(-margin, dtype=torch.float64))
    expected = torch.log1p(squares) - 2 * torch.log1p(others)
    inputs = (torch.ones(1, 1), logits.float().t().contiguous(), torch.tensor([4]))
    if form == "logits":
        found = token_statistics(logits.float().requires_grad_(), inputs[2], wanted=("log_sum_sq_probs",))
    else:
        chunking = Chunking(strategy=form, chunk_size=3)
        found = linear_token_statistics(*inputs, wanted=("log_sum_sq_probs",), chunking=chunking)
    torch.testing.assert_close(found.log_sum_sq_probs.double(), expected.reshape(1), rtol=1e-6, atol=0)


def test_the_gradient_of_a_confident_tokens_sum_of_squares_keeps_its_digits():
    logits = torch.zeros(1, 7)
    logits[0, 4] = 40.0
    logits.requires_grad_()
    found = token_statistics(logits, torch.tensor([4]), wanted=("log_sum_sq_probs",)).log_sum_sq_probs
    (d,) = torch.autograd.grad(found, logits)
    p = torch.exp(torch.tensor(-40.0, dtype=torch.float64))  # of each other class; the gradient's sum is 0
    expected = torch.full((1, 7), -2.0 * p.item(), dtype=torch.float64)
    expected[0, 4] = 12 * p
    torch.testing.assert_close(d.double(), expected, rtol=1e-6, atol=0)
