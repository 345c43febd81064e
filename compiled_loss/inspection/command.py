"""`compiled-loss inspect`: from words to inspections, and from these to a terminal and files.

NOTE [Other]
`--compare` takes a line of its own, read by the same arguments. What is called, and for which device, is taken from the
first function where the line does not say it; how (options, chunking, Inductor's options, dynamic) never is.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from inspect import Parameter, signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from compiled_loss.inspection.targets import TARGETS

if TYPE_CHECKING:
    from compiled_loss.inspection.record import Inspection

DEVICES = (*TARGETS, "cpu", "cuda")
DTYPES = ("bfloat16", "float16", "float32", "float64")
SHAPE = {"tokens": 8192, "hidden": 4096, "vocab": 131072, "dtype": "bfloat16"}
WHAT = {"inputs": None, **SHAPE, "device": "cuda:sm_90", "backward": True}
INPUTS = {  # of our own functions, by the names of their parameters
    "hidden": "{dtype}[{tokens},{hidden}]:grad",
    "weight": "{dtype}[{vocab},{hidden}]:grad",
    "logits": "{dtype}[{tokens},{vocab}]:grad",
    "labels": "int64[{tokens}]:0..{last}",
}
CHUNKING = ("strategy", "chunk_size", "memory_budget")
DESCRIPTION = """\
Compile a function, forward and backward, for a GPU that need not be there, and
show kernels, GEMMs, live memory launch by launch, what is kept for backward,
graph breaks and guards.
"""
EXAMPLES = """\
examples:
  compiled-loss inspect linear_cross_entropy --option z_loss=1e-4 --plot memory.png
  compiled-loss inspect linear_cross_entropy --compare unchunked
  compiled-loss inspect linear_cross_entropy --compare "linear_cross_entropy --strategy vocab --chunk-size 16384"
  compiled-loss inspect cross_entropy --compare torch.nn.functional:cross_entropy
  compiled-loss inspect my_package.my_module:my_loss \\
      --inputs "bf16[8192,4096]:grad bf16[131072,4096]:grad int64[8192]:0..131071"

How to read the report: docs/inspection.md in the repository.
"""


def unchunked(hidden: Tensor, weight: Tensor, labels: Tensor, **options: Any) -> Tensor:
    """Give the ordinary loss of a linear head, which holds all logits: what ours are compared with."""
    return F.cross_entropy((hidden @ weight.T).float(), labels, **options)


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "inspect",
        help="show what torch.compile makes of a loss, for a GPU that need not be there",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_call(parser)
    shown = parser.add_argument_group("what is made of it")
    shown.add_argument(
        "--compare",
        type=_other,
        metavar="OTHER",
        help="put another function beside it: FUNCTION, or a line of FUNCTION and any of the arguments above, in "
        "quotes; inputs, sizes, device and backward are the first one's unless it says otherwise, options are its own",
    )
    shown.add_argument("--json", type=_file(""), metavar="FILE", help="write the report; of two, a list")
    shown.add_argument("--plot", type=_file(".png"), metavar="FILE.png", help="draw the live memory")
    shown.add_argument(
        "--dump",
        type=_folder,
        metavar="DIR",
        help="write graphs, host code, kernels, machine code and index.html; of two, into DIR/1 and DIR/2",
    )
    machine_code = shown.add_mutually_exclusive_group()
    machine_code.add_argument(
        "--assemble",
        type=_targets,
        default=True,
        metavar="TARGET,...",
        help=f"make machine code for these instead of the device, of one vendor: {', '.join(TARGETS)}",
    )
    machine_code.add_argument("--no-assemble", dest="assemble", action="store_false", help="make none")
    shown.add_argument("--no-measure", dest="measure", action="store_false", help="on cpu and cuda: do not run it")
    parser.set_defaults(run=run)


def _add_call(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that describe a call. None is what was not said."""
    parser.add_argument(
        "function",
        metavar="FUNCTION",
        help="package.module:name, from the current folder as well; or a public function of compiled_loss; or "
        '"unchunked": F.cross_entropy((hidden @ weight.T).float(), labels), the ordinary way',
    )
    what = parser.add_argument_group("what is called")
    what.add_argument(
        "--inputs",
        metavar="TEXT",
        help='positional arguments, such as "bf16[8192,4096]:grad int64[8192]:0..131071 0.5"; ours need none',
    )
    sizes = ("tokens", "N", "rows of hidden and logits"), ("hidden", "H", "width"), ("vocab", "V", "rows of weight")
    for name, letter, text in sizes:
        what.add_argument(f"--{name}", type=_size, metavar=letter, help=f"{text} (default: {SHAPE[name]})")
    what.add_argument("--dtype", choices=DTYPES, help=f"of hidden, weight and logits (default: {SHAPE['dtype']})")
    what.add_argument(
        "--device",
        choices=DEVICES,
        help=f"a GPU that need not be there, or the real cpu or cuda (default: {WHAT['device']})",
    )
    what.add_argument(
        "--backward", action=argparse.BooleanOptionalAction, help="also compile the backward (default: yes)"
    )
    how = parser.add_argument_group("how")
    how.add_argument(
        "--option",
        type=_pair,
        action="append",
        metavar="KEY=VALUE",
        help="keyword argument of the function: a Python literal, a word, or a tensor as in --inputs; repeatable",
    )
    how.add_argument("--strategy", choices=("auto", "tokens", "vocab"), help="of Chunking, for our linear losses")
    how.add_argument("--chunk-size", type=_size, metavar="C", help="the same: tokens a chunk, or columns with vocab")
    how.add_argument("--memory-budget", type=_size, metavar="BYTES", help="the same: most bytes of a chunk")
    how.add_argument(
        "--inductor", type=_pair, action="append", metavar="KEY=VALUE", help="option of Inductor; repeatable"
    )
    how.add_argument(
        "--dynamic",
        action=argparse.BooleanOptionalAction,
        help="as torch.compile takes it (default: sizes are static at first)",
    )


def run(given: argparse.Namespace) -> int:
    """Inspect, report, write the files that were asked for; the exit status."""
    asked = {"rich": True, "cloudpickle": True, "matplotlib": given.plot is not None}
    missing = [name for name, needed in asked.items() if needed and find_spec(name) is None]
    if missing:
        raise RuntimeError(f"inspect needs {', '.join(missing)}: pip install 'compiled-loss[inspect]'")
    try:
        cases = _cases(given)
        if given.dump is not None:
            given.dump.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        raise RuntimeError(str(error)) from None
    found = [_inspect(case, given, given.dump and given.dump / str(i)) for i, case in enumerate(cases, 1)]
    _report(found, given)
    return 0


# From words to calls -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Case:
    """A call to inspect. `label` tells it from the other one."""

    label: str
    fn: Callable[..., Any]
    inputs: tuple[Any, ...]
    device: str
    backward: bool
    dynamic: bool | None
    inductor: dict[str, Any] | None


def _cases(given: argparse.Namespace) -> list[Case]:
    """Make the call, and the one to compare it with: NOTE [Other]."""
    labels = [_label(given, given.function.rpartition(":")[2], [])]
    other = given.compare
    if other is not None:
        labels.append(_label(other, other.function.rpartition(":")[2], [*SHAPE, "device"]))
        if labels[0] == labels[1]:
            labels = [_label(one, one.function, []) for one in (given, other)]
            labels[1] += " (2)" * (labels[0] == labels[1])
    _complete(given, WHAT)
    first = _find(given.function)
    cases = [_case(labels[0], given, first, None)]
    if other is not None:
        _complete(other, vars(given))
        cases.append(_case(labels[1], other, _find(other.function), first))
    return cases


def _label(given: argparse.Namespace, name: str, more: Sequence[str]) -> str:
    """Name a call as in a report: its function, and what was said of how to call it."""
    said = [(key, getattr(given, key)) for key in (*CHUNKING, "dynamic", *more)]
    said += [*(given.option or ()), *(given.inductor or ())]
    return " ".join([name, *(f"{key}={value}" for key, value in said if value is not None)])


def _complete(given: argparse.Namespace, above: dict[str, Any]) -> None:
    """Take what was not said from `above`: NOTE [Other]."""
    if given.inputs is None:
        given.inputs = above["inputs"]
    said = [f"--{name}" for name in SHAPE if getattr(given, name) is not None]
    if said and given.inputs is not None:
        raise RuntimeError(f"{', '.join(said)}: inputs of {given.function} are those of --inputs")
    for name in WHAT:
        if getattr(given, name) is None:
            setattr(given, name, above[name])


def _find(name: str) -> Callable[..., Any]:
    """Find the function, in the current folder as well."""
    from compiled_loss.inspection.call import find_function

    if name == unchunked.__name__:
        return unchunked
    if ":" in name and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = find_function(name)
    except RuntimeError:
        raise
    except Exception as error:  # the user's module runs when it is imported
        raise RuntimeError(f"{name}: its import raised {type(error).__name__}: {error}") from error
    if isinstance(found, type):
        raise RuntimeError(f"{name} is a class: name a function, or an instance that is made in the module")
    return found


def _case(label: str, given: argparse.Namespace, fn: Callable[..., Any], first: Callable[..., Any] | None) -> Case:
    """Make a call. `first` is the function whose inputs a function that is not ours takes, if there is one."""
    from compiled_loss.inspection.call import TensorSpec, parse_inputs

    options = dict(given.option or ())
    if options and isinstance(fn, torch.nn.Module):  # a partial would hide its parameters
        raise RuntimeError(f"--option: {given.function} is a Module, which gets its options where it is made")
    chunking = {name: getattr(given, name) for name in CHUNKING if getattr(given, name) is not None}
    if chunking:
        if "chunking" not in _parameters(fn):
            raise RuntimeError(f"--{next(iter(chunking)).replace('_', '-')}: {given.function} takes no chunking")
        from compiled_loss.engine.plan import Chunking

        options["chunking"] = Chunking(**chunking)
    if given.inputs is not None:
        inputs = parse_inputs(given.inputs)
    elif ":" in given.function and first is None:
        raise RuntimeError(
            f'{given.function}: needs --inputs, such as --inputs "bf16[8192,4096]:grad int64[8192]:0..9"'
        )
    else:
        inputs = _made(fn if first is None or ":" not in given.function else first, given)
    if _parameters(fn):
        try:
            signature(_called(fn)).bind(*inputs, **options)
        except TypeError as error:
            raise RuntimeError(f"{given.function}: {error}, with {len(inputs)} inputs and {list(options)}") from None
    inductor = dict(given.inductor or ())
    if inductor:
        from torch._inductor import list_options

        unknown = sorted(inductor.keys() - set(list_options()))
        if unknown:
            raise RuntimeError(f"--inductor: torch {torch.__version__} has no {', '.join(unknown)}")
    tensors = {name: value for name, value in options.items() if isinstance(value, TensorSpec)}
    others = {name: value for name, value in options.items() if name not in tensors}
    if others:
        fn = _named(partial(fn, **others), label)
    if tensors:
        fn = _named(partial(_by_name, fn, tuple(tensors)), label)
    return Case(
        label=label,
        fn=fn,
        inputs=(*inputs, *tensors.values()),
        device=given.device,
        backward=given.backward,
        dynamic=given.dynamic,
        inductor=inductor or None,
    )


def _called(fn: Callable[..., Any]) -> Callable[..., Any]:
    return fn.forward if isinstance(fn, torch.nn.Module) else fn


def _parameters(fn: Callable[..., Any]) -> dict[str, Parameter]:
    """{name: parameter}, and nothing for what has no signature, as some of torch's functions."""
    try:
        return dict(signature(_called(fn)).parameters)
    except (TypeError, ValueError):
        return {}


def _made(fn: Callable[..., Any], given: argparse.Namespace) -> tuple[Any, ...]:
    """Make inputs of sizes N, H and V for a function of ours."""
    from compiled_loss.inspection.call import parse_inputs

    sizes = {name: getattr(given, name) for name in SHAPE} | {"last": given.vocab - 1}
    positional = [
        p.name for p in _parameters(fn).values() if p.kind == p.POSITIONAL_OR_KEYWORD and p.default is p.empty
    ]
    unknown = [name for name in positional if name not in INPUTS]
    if unknown or not positional:
        raise RuntimeError(f"{given.function}: needs --inputs, for nothing is known of {', '.join(unknown) or 'them'}")
    return parse_inputs(" ".join(INPUTS[name].format(**sizes) for name in positional))


def _named(fn: partial[Any], name: str) -> partial[Any]:
    fn.__name__ = name  # type: ignore[attr-defined]
    return fn


def _by_name(fn: Callable[..., Any], names: tuple[str, ...], *inputs: Any) -> Any:
    """Call with the last inputs as keyword arguments: what is differentiated must be an input."""
    return fn(*inputs[: -len(names)], **dict(zip(names, inputs[-len(names) :], strict=True)))


# From inspections to a terminal and files ----------------------------------------------------------------------------


def _inspect(case: Case, given: argparse.Namespace, folder: Path | None) -> Inspection:
    from compiled_loss.inspection.inspector import inspect

    if folder is not None and given.compare is None:
        folder = given.dump
    with _progress(f"{case.label} on {case.device}") as progress:
        found = inspect(
            case.fn,
            *case.inputs,
            device=case.device,
            backward=case.backward,
            dynamic=case.dynamic,
            options=case.inductor,
            assemble=given.assemble,
            measure=given.measure,
            dump=folder,
            progress=progress,
        )
    found = replace(found, name=case.label)
    if folder is not None:
        from compiled_loss.inspection.dump import dump

        dump(found, folder)  # under this name
    return found


@contextmanager
def _progress(text: str) -> Iterator[Callable[[str], None]]:
    """Show on stderr what is being done: on a terminal as it changes, elsewhere one line."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        console.print(f"inspecting {text}", markup=False, soft_wrap=True)
        yield lambda step: None
        return
    columns = SpinnerColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False)
    with Progress(*columns, console=console, transient=True) as shown:
        task = shown.add_task(f"{text}: starting", total=None)
        yield lambda step: shown.update(task, description=f"{text}: {step}")


def _report(found: Sequence[Inspection], given: argparse.Namespace) -> None:
    from rich.console import Console

    from compiled_loss.inspection.table import report

    console = Console(highlight=False)
    console.print(report(*found))
    if given.json is not None:
        texts = [inspection.to_json() for inspection in found]
        given.json.write_text(texts[0] if len(texts) == 1 else f"[{', '.join(texts)}]", encoding="utf-8")
    if given.plot is not None:
        from compiled_loss.inspection.picture import plot

        plot(found, given.plot)
    pages = [] if given.dump is None else sorted(given.dump.glob("index.html" if len(found) == 1 else "*/index.html"))
    for path in filter(None, (given.json, given.plot, *pages)):
        console.print(f"wrote {path}", markup=False, soft_wrap=True)


# Types of arguments --------------------------------------------------------------------------------------------------


def _other(text: str) -> argparse.Namespace:
    """Read the line of --compare; what is wrong with it ends the program as the parser's own errors do."""
    parser = argparse.ArgumentParser(prog="compiled-loss inspect --compare", add_help=False)
    _add_call(parser)
    try:
        return parser.parse_args(shlex.split(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{error}: {text}") from None


def _pair(text: str) -> tuple[str, Any]:
    from compiled_loss.inspection.call import TensorSpec

    key, equals, value = text.partition("=")
    if not equals or not key:
        raise argparse.ArgumentTypeError(f"must be KEY=VALUE: {text}")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        pass
    if re.fullmatch(r"\w+\[.*", value):
        try:
            return key, TensorSpec.parse(value)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    if not value.isidentifier() or value in ("true", "false", "null"):
        raise argparse.ArgumentTypeError(f"must be KEY=VALUE with a Python literal, a word or a tensor: {text}")
    return key, value


def _size(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer, at least 1: {text}")
    return int(text)


def _targets(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in TARGETS]
    if unknown:
        raise argparse.ArgumentTypeError(f"must be of {', '.join(TARGETS)}, separated by commas: {unknown[0]}")
    return names


def _file(suffix: str) -> Callable[[str], Path]:
    """Check that a file can be written there, which is better known before the compiler's work."""

    def parse(text: str) -> Path:
        path = Path(text)
        if path.suffix.lower() != suffix and suffix:
            raise argparse.ArgumentTypeError(f"must end in {suffix}: {text}")
        if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
            raise argparse.ArgumentTypeError(f"cannot write {text}")
        return path

    return parse


def _folder(text: str) -> Path:
    """Check that a folder can be made or filled: an empty one, for old files would look like new ones."""
    path = Path(text)
    parent = next((p for p in path.parents if p.exists()), Path())
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise argparse.ArgumentTypeError(f"must be a new or empty folder: {text}")
    if not os.access(path if path.exists() else parent, os.W_OK) or not parent.is_dir():
        raise argparse.ArgumentTypeError(f"cannot write in the folder {parent}")
    return path
