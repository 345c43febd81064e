"""The arguments of `compiled-loss inspect`, and its help."""

from __future__ import annotations

import argparse
import ast
import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from compiled_loss.inspection.targets import TARGETS
from compiled_loss.pictures import dark

DEVICES = (*TARGETS, "cpu", "cuda")
DTYPES = ("bfloat16", "float16", "float32", "float64")
SHAPE = {"tokens": 8192, "hidden": 4096, "vocab": 131072, "dtype": "bfloat16"}
WHAT = {"inputs": None, **SHAPE, "device": "cuda:sm_90", "backward": True, "loss": None}
DESCRIPTION = """\
Compile a function, forward and backward, for a GPU that you need not have, and
show kernels, GEMMs, live memory launch by launch, what is kept for backward,
graph breaks and guards.
"""
EXAMPLES = """\
examples:
  compiled-loss inspect linear_cross_entropy --option z_loss=1e-4 \\
      --plot memory.png
  compiled-loss inspect linear_cross_entropy --compare unchunked
  compiled-loss inspect linear_cross_entropy \\
      --compare "linear_cross_entropy --strategy vocab --chunk-size 16384"
  compiled-loss inspect cross_entropy \\
      --compare torch.nn.functional:cross_entropy
  compiled-loss inspect my_package.my_module:my_loss --inputs \\
      "bf16[8192,4096]:grad bf16[131072,4096]:grad int64[8192]:0..131071"

How to read the report: docs/inspection.md in the repository.
"""


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Adds the subcommand's parser."""
    parser = commands.add_parser(
        "inspect",
        help="show what torch.compile makes of a loss, for a GPU that you need not have",
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
        help="compare with a second function: FUNCTION, or in quotes FUNCTION and any of the arguments above. It has "
        "the inputs, sizes, device and backward of the first unless it gives its own, and only its own options",
    )
    shown.add_argument("--json", type=_file(""), metavar="FILE", help="write the report; of two, a list")
    shown.add_argument(
        "--plot", type=_file(".png"), metavar="FILE.png", help="draw the live memory, for dark pages in FILE-dark.png"
    )
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
    return parser


def _add_call(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that describe a call. None stands for an argument that was not given."""
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
        help='positional arguments, such as "bf16[8192,4096]:grad int64[8192]:0..131071 0.5"; most of our losses need '
        "none",
    )
    sizes = ("tokens", "N", "rows of hidden and logits"), ("hidden", "H", "width"), ("vocab", "V", "rows of weight")
    for name, letter, text in sizes:
        what.add_argument(f"--{name}", type=_size, metavar=letter, help=f"{text} (default: {SHAPE[name]})")
    what.add_argument("--dtype", choices=DTYPES, help=f"of hidden, weight and logits (default: {SHAPE['dtype']})")
    what.add_argument(
        "--device",
        choices=DEVICES,
        metavar="DEVICE",
        help=f"a GPU that need not be there, {', '.join(TARGETS)}; or the real cpu or cuda (default: {WHAT['device']})",
    )
    what.add_argument(
        "--backward", action=argparse.BooleanOptionalAction, help="also compile the backward (default: yes)"
    )
    what.add_argument(
        "--loss",
        action="append",
        metavar="NAME",
        help="name of a function, or of a Module's class or attribute, that belongs to a model's loss; repeatable "
        "(default: lm_head, embed_out, cross_entropy, ForCausalLMLoss); the losses of this library always do",
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
    how.add_argument("--chunk-size", type=_size, metavar="C", help="the same: tokens per chunk, with vocab classes")
    how.add_argument("--memory-budget", type=_size, metavar="BYTES", help="the same: most bytes of a chunk of logits")
    how.add_argument(
        "--inductor", type=_pair, action="append", metavar="KEY=VALUE", help="option of Inductor; repeatable"
    )
    how.add_argument(
        "--dynamic",
        action=argparse.BooleanOptionalAction,
        help="as torch.compile takes it (default: sizes are static at first)",
    )


# Types of arguments --------------------------------------------------------------------------------------------------


def _other(text: str) -> argparse.Namespace:
    """Reads the line of --compare. An error in it ends the program as the parser's own errors do."""
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
    """Returns a type of arguments that checks whether a file can be written, before the compiler's work."""

    def parse(text: str) -> Path:
        path = Path(text)
        if path.suffix.lower() != suffix and suffix:
            raise argparse.ArgumentTypeError(f"must end in {suffix}: {text}")
        for file in (path, dark(path)) if suffix == ".png" else (path,):
            if file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK):
                raise argparse.ArgumentTypeError(f"cannot write {file}")
        return path

    return parse


def _folder(text: str) -> Path:
    """Checks that a folder can be made, or is empty and can be written: old files would look like new ones."""
    path = Path(text)
    parent = next((p for p in path.parents if p.exists()), Path())
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise argparse.ArgumentTypeError(f"must be a new or empty folder: {text}")
    if not os.access(path if path.exists() else parent, os.W_OK) or not parent.is_dir():
        raise argparse.ArgumentTypeError(f"cannot write in the folder {parent}")
    return path
