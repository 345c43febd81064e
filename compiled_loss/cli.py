"""The command `compiled-loss`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

FIRST = """\
try first:
  compiled-loss demo
      the loss curves and the peak memory of a small training, in minutes
  compiled-loss inspect linear_cross_entropy --device cuda:sm_90
      what the compiler makes of a loss for an H100 that you need not have
"""
DEMO_EXTRAS = ("matplotlib", "rich", "tokenizers")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a subcommand and returns its exit status."""
    parser = make_parser()
    try:
        given = parser.parse_args(arguments)
        return int(given.run(given))
    except KeyboardInterrupt:
        return 130
    except RuntimeError as error:
        parser.exit(1, f"compiled-loss: {str(error).rstrip()}\n")


def make_parser() -> argparse.ArgumentParser:
    """Makes the parser of the command and its subcommands."""
    parser = argparse.ArgumentParser(
        prog="compiled-loss",
        description="Losses for language-model training that never hold the logits.",
        epilog=FIRST,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(metavar="command", required=True)
    _add_demo(commands)
    _add_inspect(commands)
    return parser


def _add_demo(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    from compiled_loss.demo.settings import DTYPES, HEAD_WIDTH, LEAST_VOCAB, SEQUENCE, devices

    available = devices()
    parser = commands.add_parser(
        "demo",
        help="train a small transformer with an ordinary loss and with ours, and compare them",
        description="Train a transformer on the standard library's sources, twice from one seed: with F.cross_entropy "
        "on materialised logits, and with linear_cross_entropy. Compares loss, time and memory. Defaults depend on "
        "the device.",
    )
    whole = _integer()
    parser.add_argument("--device", choices=available, default=available[0], help="default: %(default)s")
    parser.add_argument("--dtype", choices=DTYPES, help="of weights and logits")
    parser.add_argument("--steps", type=whole, help="training steps with each loss")
    parser.add_argument("--vocab", type=_integer(LEAST_VOCAB), help="size of the vocabulary")
    parser.add_argument("--tokens", type=_integer(SEQUENCE, SEQUENCE), help=f"tokens a step, a multiple of {SEQUENCE}")
    parser.add_argument("--width", type=_integer(HEAD_WIDTH, HEAD_WIDTH), help=f"a multiple of {HEAD_WIDTH}")
    parser.add_argument("--layers", type=whole, help="blocks of the transformer")
    parser.add_argument(
        "--output",
        type=_png,
        default=Path("compiled-loss-demo.png"),
        help="the picture, whose partner for dark pages is NAME-dark.png (default: %(default)s)",
    )
    parser.set_defaults(run=_demo)


def _demo(given: argparse.Namespace) -> int:
    missing = [name for name in DEMO_EXTRAS if find_spec(name) is None]
    if missing:
        raise RuntimeError(f"the demo needs {', '.join(missing)}: pip install 'compiled-loss[demo]'")
    from compiled_loss.demo.session import demo
    from compiled_loss.demo.settings import settings_for

    options = {name: value for name, value in vars(given).items() if name not in ("run", "output", "device")}
    return demo(settings_for(given.device, **options), given.output)


def _add_inspect(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    from compiled_loss.inspection import command

    command.add(commands)


def _integer(least: int = 1, step: int = 1) -> Callable[[str], int]:
    """Makes an argument's type: an integer from `least` on, a multiple of `step`."""

    def parse(text: str) -> int:
        multiple = f"a multiple of {step}, " if step > 1 else ""
        if not text.isdecimal() or int(text) < least or int(text) % step:
            raise argparse.ArgumentTypeError(f"must be an integer, {multiple}at least {least}: {text}")
        return int(text)

    return parse


def _png(text: str) -> Path:
    """Checks that a picture can be written there, before minutes of training."""
    path = Path(text)
    if path.suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(f"must end in .png: {text}")
    if not os.access(path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"cannot write in the folder {path.parent}")
    return path


if __name__ == "__main__":
    raise SystemExit(main())
