"""Assertions for your own losses: inputs, error budgets and compile contracts, as this library's tests use them.

N tokens, H width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compiled_loss.inspection import Inspection
from compiled_loss.planner.chunking import Chunking


class HeadInputs(NamedTuple):
    """Inputs of a linear head: hidden [N, H], weight [V, H], labels [N], bias [V]; all but labels require grad."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    bias: Tensor

    def to(self, dtype: torch.dtype) -> HeadInputs:
        """Returns fresh leaves with the same values in another dtype."""
        hidden, weight, bias = (
            v.detach().to(dtype, copy=True).requires_grad_() for v in (self.hidden, self.weight, self.bias)
        )
        return HeadInputs(hidden, weight, self.labels, bias)


def head_inputs(
    tokens: int,
    width: int,
    vocab: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    ignored: float = 0.0,
    ignore_index: int = -100,
    confident: float = 0.0,
    seed: int = 0,
) -> HeadInputs:
    """Makes random inputs whose logits have unit scale.

    Args:
        ignored: fraction of labels that are `ignore_index`.
        confident: fraction of tokens whose label has p > 0.99, where rounding errors are easiest to see.

    Example:
        >>> from compiled_loss.testing import head_inputs
        >>> head_inputs(3, 4, 7).hidden.shape
        torch.Size([3, 4])

    """
    random = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=random, dtype=torch.float64)
    weight = torch.randn(vocab, width, generator=random, dtype=torch.float64) / math.sqrt(width)
    bias = torch.randn(vocab, generator=random, dtype=torch.float64) / 4
    labels = torch.randint(0, vocab, (tokens,), generator=random)
    sure = torch.rand(tokens, generator=random) < confident
    if tokens:
        norms = weight[labels].square().sum(-1, keepdim=True).clamp(min=1e-3)
        toward = weight[labels] / norms * (math.log(vocab) + 12)
        hidden = torch.where(sure.unsqueeze(-1), toward + hidden / 8, hidden)
    labels = torch.where(torch.rand(tokens, generator=random) < ignored, ignore_index, labels)
    hidden, weight, bias = (v.to(device, dtype).requires_grad_() for v in (hidden, weight, bias))
    return HeadInputs(hidden, weight, labels.to(device), bias)


def assert_within_error_budget(
    actual: Tensor, baseline: Tensor, truth: Tensor, *, factor: float = 2.0, name: str = ""
) -> None:
    """Fails unless `actual` is as close to the fp64 `truth` as `factor` times `baseline` plus a rounding of its dtype.

    `baseline` is the ordinary computation in the same dtypes; errors are root mean squares over all elements, so the
    bound is derived from the arithmetic and not tuned.

    Raises:
        AssertionError: with both errors, where the budget is exceeded or a value is not finite that should be.

    Example:
        >>> import torch
        >>> from compiled_loss.testing import assert_within_error_budget
        >>> truth = torch.tensor([1 / 3], dtype=torch.float64)
        >>> assert_within_error_budget(truth.float(), truth.float(), truth)

    """
    assert truth.dtype == torch.float64, "the truth of an error budget is computed in float64"
    assert actual.shape == truth.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    if not truth.numel():
        return
    actual, baseline, truth = actual.detach(), baseline.detach(), truth.detach()
    mine, theirs = (float((v.double() - truth).square().mean().sqrt()) for v in (actual, baseline))
    rounding = torch.finfo(actual.dtype).eps / 2 * float(truth.square().mean().sqrt())
    smallest = float(torch.finfo(actual.dtype).smallest_normal) * torch.finfo(actual.dtype).eps  # a subnormal's spacing
    budget = factor * theirs + rounding + smallest
    assert mine <= budget, f"{name}: error {mine:.3e} exceeds {factor} x the baseline's {theirs:.3e} + {rounding:.3e}"


@contextmanager
def inputs_unchanged(*inputs: Tensor) -> Iterator[None]:
    """Fails unless the tensors are bit-identical when the block ends.

    Example:
        >>> import torch
        >>> from compiled_loss.testing import inputs_unchanged
        >>> x = torch.ones(3)
        >>> with inputs_unchanged(x):
        ...     y = x + 1

    """

    def bits(value: Tensor) -> Tensor:
        return value.detach().clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)

    before = [bits(v) for v in inputs]
    yield
    for i, (old, new) in enumerate(zip(before, inputs, strict=True)):
        assert old.equal(bits(new)), f"input {i}, {tuple(new.shape)} {new.dtype}, was written"


def count_graphs(
    fn: Callable[..., Any], calls: Sequence[Sequence[Any]], *, backend: str = "eager", dynamic: bool | None = None
) -> int:
    """Counts the graphs that `torch.compile(fn, fullgraph=True)` makes over several calls: 1 if nothing recompiles.

    With backend "eager" only Dynamo runs, which is what decides; "inductor" adds the guards of its own.

    Example:
        >>> import torch
        >>> from compiled_loss.testing import count_graphs
        >>> count_graphs(lambda x: x + 1, [[torch.ones(2)], [torch.zeros(2)]])
        1

    """
    from torch._dynamo.testing import CompileCounterWithBackend

    torch.compiler.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(fn, backend=counter, fullgraph=True, dynamic=dynamic)
    for arguments in calls:
        compiled(*arguments)
    return int(counter.frame_count)


def assert_single_graph(inspection: Inspection) -> None:
    """Fails unless the function became one graph forward, with no graph break.

    Graphs that an operator compiles inside its own implementation are not the function's.

    Example:
        >>> import torch
        >>> from compiled_loss.inspection import inspect
        >>> from compiled_loss.testing import assert_single_graph
        >>> found = inspect(torch.logsumexp, "f32[64,1000]:grad", 1, device="cpu", measure=False)
        >>> assert_single_graph(found)

    """
    breaks = "".join(f"\n  {b.location}: {b.reason}" for b in inspection.breaks)
    assert not inspection.breaks, f"{inspection.name}: graph breaks:{breaks}"
    count = sum(g.direction == "forward" and not g.operator for g in inspection.graphs)
    assert count == 1, f"{inspection.name}: {count} forward graphs, expected 1"


def assert_peak_below(inspection: Inspection, size: int) -> None:
    """Fails unless the most bytes alive over the inputs, forward or backward, are fewer than `size`.

    Example:
        >>> import torch
        >>> from compiled_loss.inspection import inspect
        >>> from compiled_loss.testing import assert_peak_below
        >>> found = inspect(torch.logsumexp, "f32[64,1000]:grad", 1, device="cpu", measure=False)
        >>> assert_peak_below(found, 2 * 4 * 64 * 1000)

    """
    where, launch = max(
        ((p, i) for p in inspection.passes for i in p.launches),
        key=lambda pair: pair[1].live_bytes,
        default=(None, None),
    )
    at = "" if where is None or launch is None else f", first reached at {launch.kernel}"
    assert inspection.peak_bytes < size, (
        f"{inspection.name}: peak of {inspection.peak_bytes} bytes over the inputs, expected below {size}{at}"
    )


def assert_saves_nothing_larger_than(inspection: Inspection, size: int) -> None:
    """Fails where a tensor kept between forward and backward, neither input nor result, is larger than `size` bytes.

    Example:
        >>> import torch
        >>> from compiled_loss.inspection import inspect
        >>> from compiled_loss.testing import assert_saves_nothing_larger_than
        >>> found = inspect(torch.logsumexp, "f32[64,1000]:grad", 1, device="cpu", measure=False)
        >>> assert_saves_nothing_larger_than(found, 4 * 64)  # one row statistic

    """
    large = [t for t in inspection.saved if t.size > size]
    listed = "".join(f"\n  {t.dtype}{list(t.shape)}, {t.size} bytes: {t.origin} ({t.location})" for t in large)
    assert not large, f"{inspection.name}: saves for backward, of more than {size} bytes:{listed}"


def assert_label_tokens_fit(
    labels: Tensor, chunking: Chunking, *, mask: Tensor | None = None, ignore_index: int = -100, shift: int = 0
) -> None:
    """Fails unless the tokens of a batch that count are as few as `chunking.max_label_tokens` promises.

    For the batches of a data set; all else as the loss is given it.

    Example:
        >>> import torch
        >>> from compiled_loss import Chunking
        >>> from compiled_loss.testing import assert_label_tokens_fit
        >>> assert_label_tokens_fit(torch.tensor([3, -100, -100, 5]), Chunking(max_label_tokens=0.5))

    """
    active = labels != ignore_index
    if mask is not None:
        active = active & (mask != 0)
    active = torch.nn.functional.pad(active[..., shift:], (0, min(shift, active.shape[-1])))
    count, rows = int(active.sum()), chunking.rows(active.numel())
    assert rows is None or count <= rows, (
        f"{count} of {active.numel()} tokens count, and max_label_tokens={chunking.max_label_tokens} computes {rows}"
    )


def assert_kernel_count(inspection: Inspection, count: int) -> None:
    """Fails unless there are `count` distinct generated kernels, forward and backward together.

    Example:
        >>> import torch
        >>> from compiled_loss.inspection import inspect
        >>> from compiled_loss.testing import assert_kernel_count
        >>> found = inspect(torch.logsumexp, "f32[64,1000]:grad", 1, device="cpu", measure=False)
        >>> assert_kernel_count(found, 2)

    """
    generated = [k for k in inspection.kernels if k.source]
    listed = "".join(f"\n  {k.kind}: {k.name}" for k in generated)
    assert len(generated) == count, f"{inspection.name}: {len(generated)} generated kernels, expected {count}:{listed}"


def assert_assembles(inspection: Inspection, targets: Sequence[str], *, spills: int = 0) -> None:
    """Fails unless every generated kernel was assembled for each of `targets`, the first configuration within `spills`.

    The inspection must have been asked to: `inspect(..., assemble=targets)`. `spills` are bytes a thread.

    Example:
        >>> import torch
        >>> from compiled_loss.inspection import inspect
        >>> from compiled_loss.testing import assert_assembles
        >>> found = inspect(torch.logsumexp, "f32[64,1000]:grad", 1, device="cuda:sm_90")
        >>> assert_assembles(found, ["cuda:sm_90"])

    """
    generated = [k for k in inspection.kernels if k.source]
    assert generated, f"{inspection.name}: no generated kernel"
    for kernel in generated:
        for target in targets:
            first = next((c for c in kernel.configurations if c.target == target), None)
            assert first is not None, (
                f"{kernel.name}: not assembled for {target}: use inspect(..., assemble={list(targets)})"
            )
            assert first.spills <= spills, f"{kernel.name}: spills {first.spills} bytes a thread on {target}"
