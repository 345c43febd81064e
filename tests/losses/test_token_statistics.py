"""Statistics of logits that exist: the specification's numbers and gradients, one pass each way, nothing kept."""

from functools import partial

import pytest
import torch
from comparing import TIGHT, assert_matches
from torch.autograd.graph import saved_tensors_hooks

from compiled_loss import Chunking, linear_token_statistics, reference, token_statistics
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


@pytest.mark.parametrize("form", ["logits", "tokens", "vocab"])
def test_only_what_is_wanted(form):
    """The mean logit, which the default lacks; None for the rest."""
    hidden, weight, labels, _ = head_inputs(11, 5, 17, dtype=torch.float64, ignored=0.2)
    inputs = (hidden, weight) if form == "vocab" else (hidden.detach(), weight)
    chunking = Chunking() if form == "logits" else Chunking(strategy=form, chunk_size=4)

    def statistics(hidden, weight, wanted):
        if form == "logits":
            return token_statistics(hidden @ weight.t(), labels, softcap=3.0, wanted=wanted)
        weight = weight if form == "vocab" else weight.detach()
        return linear_token_statistics(hidden, weight, labels, softcap=3.0, wanted=wanted, chunking=chunking)

    found = statistics(*inputs, ("mean_logit", "logprob"))
    assert found.entropy is found.logsumexp is found.correct is None

    def means(hidden, weight):
        z = reference.token_logits(hidden, weight, softcap=3.0)
        return torch.where(labels != -100, z.mean(-1), 0.0)

    if form == "tokens":
        torch.testing.assert_close(found.mean_logit, means(*inputs).detach())
    else:
        assert_matches(lambda *v: statistics(*v, ("mean_logit",)).mean_logit, means, inputs)
    with pytest.raises(ValueError, match=r"^wanted: expected some of 'logprob', .*got 'perplexity'"):
        statistics(*inputs, ("perplexity",))
    with pytest.raises(TypeError, match=r"^wanted: expected some of .* in a tuple, got 'entropy'"):
        statistics(*inputs, "entropy")
