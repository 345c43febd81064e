"""The demo end to end with a tiny model, as a user starts it: in a process, from a folder that is not the project's."""

import os
import signal
import struct
import subprocess
import sys
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import pytest

from compiled_loss import cli

pytestmark = pytest.mark.skipif(any(find_spec(name) is None for name in cli.DEMO_EXTRAS), reason="needs the extra demo")

ROOT = Path(__file__).parents[2]
TINY = ("--device", "cpu", "--vocab", "1024", "--tokens", "256", "--width", "64", "--layers", "1")


# In every process before its program: what a user sees, without the minutes that g++ takes for two trainings.
WITHOUT_COMPILING = "import torch\ntorch.compiler.set_stance('force_eager')\n"


@pytest.fixture
def start(tmp_path, tmp_path_factory):
    """Start the command in an empty folder, in a group of its own that can be interrupted, and end it in any case."""
    started = []
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # an ignored signal would stay so in children

    def _start(*arguments, compiles=False):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
        if not compiles:
            first = tmp_path_factory.mktemp("first")
            Path(first, "sitecustomize.py").write_text(WITHOUT_COMPILING)
            environment["PYTHONPATH"] = f"{first}{os.pathsep}{ROOT}"
        process = subprocess.Popen(
            [sys.executable, "-m", "compiled_loss.cli", "demo", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env=environment,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield _start
    signal.signal(signal.SIGINT, handler)
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def read_until(process, text):
    seen = ""
    for line in process.stdout:
        seen += line
        if text in line:
            return seen
    raise AssertionError(f"no {text!r} in:\n{seen}{process.stderr.read()}")


def row(output, name):
    return next(line for line in output.splitlines() if line.startswith(name))


def png_size(path):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert data[-8:-4] == b"IEND"
    return struct.unpack(">II", data[16:24])


def children(process):
    """Process ids of its children, and theirs."""
    found = [process.pid]
    for pid in found:
        with suppress(FileNotFoundError):  # it has ended, or this is not Linux
            found += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    return found[1:]


def running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("compiles", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["eager", "compiled"])
def test_end_to_end(start, tmp_path, compiles):
    process = start(*TINY, "--steps", "3", "--output", "curves.png", compiles=compiles)
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    assert not errors
    assert float(row(output, "curves' largest difference").split()[-2]) < 1e-4
    assert row(output, "step time").count(" s ") == row(output, "compile time").count(" s ") == 2
    assert "MiB" in row(output, "peak memory over the model") or sys.platform != "linux"
    assert f"{tmp_path / 'curves.png'}, for dark pages curves-dark.png" in output
    for name in ("curves.png", "curves-dark.png"):
        width, height = png_size(tmp_path / name)
        assert width > height > 500


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "killpg"), reason="process groups")
@pytest.mark.parametrize(
    "send",
    [
        pytest.param(getattr(os, "killpg", None), id="as a terminal does"),
        pytest.param(os.kill, id="one process"),
    ],
)
def test_interruption_still_draws_what_ran(start, tmp_path, send):
    process = start(*TINY, "--steps", "1000000")
    read_until(process, "tokens/s")
    below = children(process)
    send(process.pid, signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert not errors
    assert " s " in row(output, "step time")
    assert str(tmp_path / "compiled-loss-demo.png") in output
    png_size(tmp_path / "compiled-loss-demo.png")
    deadline = time.monotonic() + 10
    while any(map(running, below)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not list(filter(running, below))


def test_interruption_before_anything_ran(start, tmp_path):
    process = start(*TINY)
    read_until(process, "tokenizer")
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "before the first step" in output
    assert not errors
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "abacus"], "argument --device: invalid choice: 'abacus'"),
        (["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["--steps", "0"], "argument --steps: must be an integer, at least 1: 0"),
        (["--steps", "few"], "argument --steps: must be an integer, at least 1: few"),
        (["--vocab", "100"], "argument --vocab: must be an integer, at least 512: 100"),
        (["--tokens", "300"], "argument --tokens: must be an integer, a multiple of 256, at least 256: 300"),
        (["--width", "-64"], "argument --width: must be an integer, a multiple of 64, at least 64: -64"),
        (["--output", "curves.pdf"], "argument --output: must end in .png: curves.pdf"),
        (["--output", "nowhere/curves.png"], "argument --output: cannot write in the folder nowhere"),
    ],
)
def test_bad_arguments_are_one_line(capsys, arguments, message):
    with pytest.raises(SystemExit) as exit:
        cli.main(["demo", *arguments])
    assert exit.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"compiled-loss demo: error: {message}")


@pytest.mark.parametrize("command", [[], ["demo"], ["inspect"]], ids=["all", "demo", "inspect"])
def test_help_fits_a_terminal(capsys, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as exit:
        cli.main([*command, "--help"])
    assert exit.value.code == 0
    assert not [line for line in capsys.readouterr().out.splitlines() if len(line) > 80]


def test_missing_extras_are_one_line(capsys, monkeypatch):
    monkeypatch.setattr(cli, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as exit:
        cli.main(["demo"])
    assert exit.value.code == 1
    assert capsys.readouterr().err == (
        "compiled-loss: the demo needs matplotlib, rich, tokenizers: pip install 'compiled-loss[demo]'\n"
    )


def test_failure_of_a_child_is_told_with_its_messages(capfd):
    from compiled_loss.demo.child import events

    with pytest.raises(RuntimeError, match=r"(?s)Traceback.*no_such_argument.*exit status 1"):
        list(events("compiled_loss.demo.text", no_such_argument=1))
    assert capfd.readouterr() == ("", "")
