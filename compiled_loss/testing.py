"""What this library's tests are made of, for users' own losses: inputs, error budgets and compile contracts.

N tokens, H width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

_GEMMS = ("mm", "addmm", "bmm", "baddbmm", "mm_out", "addmm_", "linear")


class HeadInputs(NamedTuple):
    """Inputs of a linear head: hidden [N, H], weight [V, H], labels [N], bias [V]; gradients but for labels."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    bias: Tensor

    def to(self, dtype: torch.dtype) -> HeadInputs:
        """Fresh leaves with the same values in another dtype."""
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
    """Random inputs with logits of unit scale.

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
    """Fail unless `actual` is as close to the fp64 `truth` as `factor` times `baseline` plus one rounding of its dtype.

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
    """Fail unless the tensors are bit-identical when the block ends.

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
    """Graphs that `torch.compile(fn, fullgraph=True)` makes over a sequence of calls: 1 where nothing recompiles.

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


@dataclass(frozen=True)
class Graph:
    """One of the graphs Inductor was given, after the partition into forward and backward."""

    module: torch.fx.GraphModule
    outputs: tuple[Tensor, ...]

    @property
    def gemms(self) -> int:
        """GEMMs it runs, those of nested regions once a call."""
        return _gemms(self.module)


def _gemms(module: torch.fx.GraphModule) -> int:
    total = 0
    for node in module.graph.nodes:
        if node.op != "call_function":
            continue
        name = str(node.target)
        if name == "invoke_subgraph":
            total += _gemms(getattr(module, node.args[0].target))
        elif name.startswith("auto_functionalized"):
            total += str(node.args[0]).split(".")[-2] in _GEMMS
        elif "." in name:
            total += name.split(".")[-2] in _GEMMS
    return total


@dataclass(frozen=True)
class Graphs:
    """Forward and backward of one compiled call, and the bytes kept between them that are not inputs."""

    forward: Graph
    backward: Graph | None
    kept_bytes: int


def inductor_graphs(fn: Callable[..., Tensor], *inputs: Any) -> Graphs:
    """What Inductor is given for `fn(*inputs)` and its backward, and what is kept in between.

    The partition is Inductor's own, so a GEMM that it moves into backward is seen there. Compiles with Inductor, runs
    forward and backward once.

    Example:
        >>> import torch
        >>> from compiled_loss.testing import inductor_graphs
        >>> graphs = inductor_graphs(lambda x: x.exp().sum(), torch.ones(8, requires_grad=True))
        >>> graphs.kept_bytes  # backward computes the exponentials again
        0

    """
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    seen: list[Graph] = []

    def inner(module: torch.fx.GraphModule, example_inputs: Sequence[Any], **keywords: Any) -> Any:
        outputs = next(node for node in module.graph.nodes if node.op == "output").args[0]
        values = [n.meta["val"] if isinstance(n, torch.fx.Node) else n for n in outputs]
        placeholders = {n for n in module.graph.nodes if n.op == "placeholder"}
        own = tuple(
            v for n, v in zip(outputs, values, strict=True) if isinstance(v, Tensor) and _base(n) not in placeholders
        )
        seen.append(Graph(module, own))
        return compile_fx_inner(module, example_inputs, **keywords)

    def backend(module: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        return compile_fx(module, list(example_inputs), inner_compile=inner)

    torch.compiler.reset()
    with torch._inductor.config.patch(force_disable_caches=True):
        result = torch.compile(fn, backend=backend, fullgraph=True)(*inputs)
        kept = sum({id(v): v.numel() * v.element_size() for v in seen[0].outputs}.values())
        kept -= result.numel() * result.element_size()
        if result.requires_grad:
            wanted = [v for v in inputs if isinstance(v, Tensor) and v.requires_grad]
            torch.autograd.grad(result, wanted, torch.ones_like(result))
    return Graphs(seen[0], seen[1] if len(seen) > 1 else None, kept)


def _base(node: Any) -> Any:
    """What a chain of views is a view of."""
    views = (
        "slice",
        "view",
        "t",
        "permute",
        "transpose",
        "select",
        "reshape",
        "unsqueeze",
        "squeeze",
        "expand",
        "as_strided",
    )
    while (
        isinstance(node, torch.fx.Node)
        and node.op == "call_function"
        and str(node.target).split(".")[1:2] in [[v] for v in views]
    ):
        node = node.args[0]
    return node


def assert_keeps_at_most(size: int, fn: Callable[..., Tensor], *inputs: Any) -> None:
    """Fail if compiled `fn` keeps more than `size` bytes beside its inputs between forward and backward.

    Example:
        >>> import torch
        >>> from compiled_loss.testing import assert_keeps_at_most
        >>> assert_keeps_at_most(32, lambda x: x.exp().sum(), torch.ones(8, requires_grad=True))

    """
    kept = inductor_graphs(fn, *inputs).kept_bytes
    assert kept <= size, f"keeps {kept:,} bytes between forward and backward, expected at most {size:,}"
