"""The attribution of launches to the loss: they are those of nodes that its functions and its head made.

NOTE [The loss]
Every node of a graph, forward and backward, has a record of its origin: the Modules that were called, the function that
was called in them, and the lines of the program. The names that a user gives, or the usual ones, are looked for in this
record. Whatever this library's own code made counts as the loss, too. Inductor knows the nodes of each kernel, and a
line in the host code before each launch tells the recorder. Memory is the loss's as long as a launch of the loss was
the last to write there, and from the start if an operator of the loss allocates it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

HEADS = ("lm_head", "embed_out")
USUAL = (*HEADS, "cross_entropy", "ForCausalLMLoss")
MARK = re.compile(r"^ *of_loss\([01]\)\n", re.MULTILINE)
_PACKAGE = str(Path(__file__).parents[1])
_OWN = "compiled_loss"


class Attribution:
    """The names that a loss goes by, and those that were found."""

    def __init__(self, names: Sequence[str] | None) -> None:
        self._names = frozenset(USUAL if names is None else names)
        self._told = names is not None
        self._found: set[str] = set()

    @property
    def found(self) -> tuple[str, ...]:
        """The names that were found on nodes. Without a head among them the start of an unnamed loss is not known."""
        if not self._told and self._found.isdisjoint((*HEADS, _OWN)):
            return ()
        return tuple(sorted(self._found))

    def holds(self, node: Any) -> bool:
        """Returns True if a node of a graph belongs to the loss."""
        names = set(_names(node.meta)) & {*self._names, _OWN}
        self._found |= names
        return bool(names)

    @contextmanager
    def marking(self) -> Iterator[None]:
        """Makes Inductor write `of_loss(1)` or `of_loss(0)` into the host code, before each launch."""
        from torch._inductor import debug
        from torch._inductor.codegen import cpp, triton
        from torch._inductor.codegen.wrapper import PythonWrapperCodegen

        def decide(kernel: Any, name: str, is_extern: bool = False) -> int:
            nodes = [kernel] if is_extern else [getattr(one, "node", None) for one in kernel]
            origins = [origin for node in nodes for origin in getattr(node, "origins", ())]
            held = [self.holds(origin) for origin in origins]
            # A kernel that is fused of both sides has views of the other side; a library's kernel has views of its
            # operands.
            return int(any(held) if is_extern else 2 * sum(held) >= len(held) > 0)

        def write(wrapper: Any, name: str, decided: int) -> None:
            wrapper.writeline(f"of_loss({decided})")

        with ExitStack() as stack:
            for module in (debug, cpp, triton):
                stack.enter_context(mock.patch.object(module, "set_kernel_post_grad_provenance_tracing", decide))
            stack.enter_context(mock.patch.object(PythonWrapperCodegen, "write_provenance_debug_handle", write))
            yield


def _names(meta: dict[str, Any]) -> Iterator[str]:
    """Yields the names by which a node may belong to the loss."""
    for path, kind in (meta.get("nn_module_stack") or meta.get("fwd_nn_module_stack") or {}).values():
        yield from re.findall(r"\w+", path)
        yield kind if isinstance(kind, str) else kind.__name__
    for _, function in meta.get("source_fn_stack") or meta.get("fwd_source_fn_stack") or ():
        yield function if isinstance(function, str) else getattr(function, "__name__", "")
    for file, function in re.findall(r'File "(.+?)", line \d+, in (\w+)', meta.get("stack_trace") or ""):
        yield _OWN if file.startswith(_PACKAGE) else function
