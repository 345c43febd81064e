"""Contract: where code cannot look at labels, one that is no class makes NaN of its own token, and of nothing else."""

import pytest
import torch
from torch import float64

import compiled_loss
from compiled_loss import Chunking, reference
from compiled_loss.testing import head_inputs

H, BAD = 4, 4  # width, and the bad token
CASES = {
    "tokens, sum": {"reduction": "sum", "chunking": Chunking(strategy="tokens", chunk_size=3)},
    "vocab, mean": {"reduction": "mean", "chunking": Chunking(strategy="vocab", chunk_size=7)},
    "vocab, none": {"reduction": "none", "chunking": Chunking(strategy="vocab", chunk_size=7)},
}


def bad_inputs(value):
    inputs = head_inputs(8, H, 13, dtype=float64)
    labels = inputs.labels.clone()
    labels[BAD] = value
    return inputs._replace(labels=labels)


def only_bad_is_nan(rows):
    """[8] or [8, H]: every number of the bad row is NaN, every other one is finite."""
    expected = (torch.arange(8) == BAD).reshape(-1, *[1] * (rows.dim() - 1)).expand(rows.shape)
    assert torch.equal(rows.isnan(), expected)
    assert rows[~expected].isfinite().all()


@pytest.mark.parametrize("case", CASES)
def test_nan_of_its_own_token(case):
    """Compiled code cannot look at labels without synchronising: no error, and NaN exactly there."""
    keywords = {"z_loss": 0.1, "label_smoothing": 0.1, **CASES[case]}

    def call(hidden, weight, labels, bias):
        return compiled_loss.linear_cross_entropy_with_statistics(hidden, weight, labels, bias=bias, **keywords)

    compiled = torch.compile(call, backend="eager", fullgraph=True)
    for value in (13, -1, 2**40):
        inputs = bad_inputs(value)
        loss, statistics = compiled(*inputs)
        assert not statistics.correct[BAD]
        for rows in statistics[:3]:
            only_bad_is_nan(rows)
        if keywords["reduction"] == "none":
            only_bad_is_nan(loss)
            plain = {name: v for name, v in keywords.items() if name != "chunking"}
            expected = reference.linear_cross_entropy(*inputs[:3], bias=inputs.bias, **plain)
            torch.testing.assert_close(loss, expected, equal_nan=True)
        else:
            assert loss.isnan()
        only_bad_is_nan(torch.autograd.grad(loss.sum(), inputs.hidden)[0])


def test_nan_of_its_own_logits():
    logits = torch.randn(8, 13, dtype=float64, requires_grad=True)
    labels = bad_inputs(13).labels
    compiled = torch.compile(compiled_loss.cross_entropy, backend="eager", fullgraph=True)
    loss = compiled(logits, labels, reduction="none")
    only_bad_is_nan(loss)
    torch.testing.assert_close(loss, reference.cross_entropy(logits, labels, reduction="none"), equal_nan=True)
    only_bad_is_nan(torch.autograd.grad(loss.sum(), logits)[0])
    assert compiled(logits, labels).isnan()


@pytest.mark.parametrize("chunking", [Chunking(), Chunking(strategy="vocab", chunk_size=7)])
def test_nan_of_its_own_statistics(chunking):
    hidden, weight, labels, bias = bad_inputs(13)
    compiled = torch.compile(compiled_loss.linear_token_statistics, backend="eager", fullgraph=True)
    statistics = compiled(hidden, weight, labels, bias=bias, chunking=chunking)
    for rows in statistics[:3]:
        only_bad_is_nan(rows)
    good = torch.arange(8) != BAD
    expected = reference.linear_token_statistics(hidden[good], weight, labels[good], bias=bias)
    torch.testing.assert_close(tuple(v[good] for v in statistics[:4]), tuple(expected[:4]))
    assert not statistics.correct[BAD]
    only_bad_is_nan(torch.autograd.grad(statistics.logprob.sum(), hidden)[0])


def test_masked_label_out_of_range_compiled():
    hidden, weight, labels, bias = bad_inputs(13)
    mask = torch.arange(8) != BAD
    compiled = torch.compile(compiled_loss.linear_cross_entropy, backend="eager", fullgraph=True)
    loss = compiled(hidden, weight, labels, bias=bias, mask=mask)
    torch.testing.assert_close(loss, reference.linear_cross_entropy(hidden[mask], weight, labels[mask], bias=bias))
    assert torch.autograd.grad(loss, weight)[0].isfinite().all()
