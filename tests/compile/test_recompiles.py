"""Contract 5: how many graphs and kernels are compiled as N, labels, masks, counts and options change."""

import functools
import subprocess
import sys
import textwrap

import cases
import pytest
import torch
from comparing import assert_matches

from compiled_loss import Chunking, cross_entropy, linear_cross_entropy, linear_token_statistics
from compiled_loss.engine import kernels
from compiled_loss.testing import count_graphs, head_inputs


@pytest.mark.parametrize("strategy", ["tokens", "vocab"])
@pytest.mark.parametrize("size", [None, 1024])
def test_graphs_as_n_varies(strategy, size):
    """Static, then dynamic: as many as of any function."""
    random = torch.Generator().manual_seed(0)
    counts = [int(100 * 1310.72 ** float(torch.rand((), generator=random))) for _ in range(40)]
    calls = [(torch.zeros(n, 2, requires_grad=True), torch.zeros(3, 2), torch.zeros(n).long()) for n in counts]
    loss = functools.partial(linear_cross_entropy, chunking=Chunking(strategy=strategy, chunk_size=size))
    assert count_graphs(loss, calls) == 2


@pytest.fixture
def compilations(monkeypatch):
    """The numbers of rows for which bodies were compiled."""
    found, compile_ = [], kernels.Compiled._compile
    monkeypatch.setattr(kernels.Compiled, "_compile", lambda one, rows, v: found.append(rows) or compile_(one, rows, v))
    return found


@pytest.mark.parametrize("strategy", ["tokens", "vocab"])
@pytest.mark.parametrize("chunks", [1, 8, 64])
def test_kernels_compiled_once_for_all_chunks(compilations, strategy, chunks):
    inputs = head_inputs(128, 8, 192)
    size = (192 if strategy == "vocab" else 128) // chunks
    loss = cases.linear(Chunking(strategy=strategy, chunk_size=size, compile=True))(*inputs)
    cases.gradients(loss, inputs)
    assert len(compilations) == (2 if strategy == "vocab" else 1)  # forward's and backward's


@pytest.mark.parametrize("strategy", ["tokens", "vocab"])
def test_kernels_compiled_as_n_varies(compilations, strategy):
    """Each for few rows and for many."""
    for tokens in (512, 1, 333, 2, 1025, 10000):
        inputs = head_inputs(tokens, 2, 7)
        cases.gradients(cases.linear(Chunking(strategy=strategy, compile=True))(*inputs), inputs)
    assert len(compilations) == (4 if strategy == "vocab" else 2)


@pytest.mark.parametrize("strategy", ["tokens", "vocab"])
def test_a_second_step_compiles_nothing(strategy):
    inputs = head_inputs(13, 7, 29)
    loss = torch.compile(cases.linear(cases.CHUNKINGS[strategy]), fullgraph=True)
    for stance in ("default", "fail_on_recompile", "fail_on_recompile"):
        with torch.compiler.set_stance(stance):
            torch.autograd.grad(loss(*inputs), [inputs.hidden, inputs.weight])


@pytest.mark.parametrize("strategy", ["tokens", "vocab"])
@pytest.mark.usefixtures("plain_bodies")
def test_memory_budget_of_many_chunks(strategy):
    """A budget that means 256 chunks and more costs no graph and no kernel more than one chunk."""
    inputs = head_inputs(512, 8, 512, dtype=torch.float64)
    loss = torch.compile(cases.linear(Chunking(strategy=strategy, memory_budget=2 * 512 * 8)), fullgraph=True)
    assert_matches(loss, cases.truth(), inputs)


LOSSES = {
    "linear, tokens": lambda h, w, y, m, n: linear_cross_entropy(
        h, w, y, mask=m, reduction="sum", num_label_tokens=n, chunking=cases.CHUNKINGS["tokens"]
    ),
    "linear, vocab": lambda h, w, y, m, n: linear_cross_entropy(
        h, w, y, mask=m, reduction="sum", num_label_tokens=n, chunking=cases.CHUNKINGS["vocab"]
    ),
    "statistics": lambda h, w, y, m, n: (
        linear_token_statistics(h, w, y, mask=m, chunking=cases.CHUNKINGS["vocab"]).logprob / n
    ),
    "logits": lambda h, w, y, m, n: cross_entropy(h @ w.t(), y, mask=m, reduction="sum", num_label_tokens=n),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_no_recompile_of_labels_masks_and_counts(loss):
    hidden, weight, labels, _ = head_inputs(13, 7, 29)
    calls = []
    for i in range(4):
        mask = torch.rand(13) < i / 3
        new = torch.where(torch.rand(13) < 0.5, -100, labels.roll(i))
        calls.append((hidden, weight, new, mask, torch.tensor(i)))
    assert count_graphs(LOSSES[loss], calls) == 1
    ints = [(*call[:-1], i + 5) for i, call in enumerate(calls)]
    assert count_graphs(LOSSES[loss], ints) <= 2  # one recompile, then the number is a symbol


def test_changing_temperature_recompiles_once():
    """Annealed options are data, not constants."""
    inputs = head_inputs(13, 7, 29)
    loss = annealed(cases.CHUNKINGS["tokens"])
    values = [0.9, 0.8, 0.7, 0.6]
    assert count_graphs(loss, [(*inputs[:3], t) for t in values], backend="inductor") <= 2
    compiled = torch.compile(loss, fullgraph=True)
    for t in values:
        torch.testing.assert_close(compiled(*inputs[:3], t), loss(*inputs[:3], t))


def annealed(chunking):
    def loss(hidden, weight, labels, t):
        return linear_cross_entropy(
            hidden, weight, labels, temperature=t, softcap=20 * t, z_loss=t, label_smoothing=t / 4, chunking=chunking
        )

    return loss


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["tokens", "vocab"])
def test_first_call_in_a_fresh_process_is_compiled(strategy):
    program = f"""
        import torch
        from compiled_loss import Chunking, linear_cross_entropy
        chunking = Chunking(strategy={strategy!r}, chunk_size=4)
        h, w = torch.randn(6, 4, requires_grad=True), torch.randn(11, 4, requires_grad=True)
        y = torch.randint(0, 11, (6,))
        loss = torch.compile(linear_cross_entropy, fullgraph=True)(h, w, y, chunking=chunking)
        loss.backward()
        expected = torch.nn.functional.cross_entropy(h @ w.t(), y)
        gradient, = torch.autograd.grad(expected, w)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(w.grad, gradient)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True)
