"""`compiled-loss inspect`: what it says of wrong words and missing extras."""

import re
import sys

import pytest

from compiled_loss import cli
from compiled_loss.inspection import command


def said(capsys, *arguments):
    with pytest.raises(SystemExit) as exit:
        cli.main(["inspect", *arguments])
    return exit.value.code, capsys.readouterr().err.splitlines()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "tpu"], "argument --device: invalid choice: 'tpu'"),
        (["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["--tokens", "0"], "argument --tokens: must be an integer, at least 1: 0"),
        (["--chunk-size", "few"], "argument --chunk-size: must be an integer, at least 1: few"),
        (["--strategy", "rows"], "argument --strategy: invalid choice: 'rows'"),
        (["--option", "z_loss"], "argument --option: must be KEY=VALUE: z_loss"),
        (
            ["--option", "a=true"],
            "argument --option: must be KEY=VALUE with a Python literal, a word or a tensor: a=tr",
        ),
        (["--option", "bias=f32[4"], "argument --option: inputs: expected dtype[size,size] with"),
        (["--assemble", "cuda:sm_90,sm_80"], "argument --assemble: must be of cuda:sm_80, cuda:sm_90, cuda:sm_100, hi"),
        (["--assemble", "cuda:sm_90", "--no-assemble"], "argument --no-assemble: not allowed with argument --assemble"),
        (["--plot", "memory.pdf"], "argument --plot: must end in .png: memory.pdf"),
        (["--plot", "nowhere/memory.png"], "argument --plot: cannot write nowhere/memory.png"),
        (["--plot", "light.png"], "argument --plot: cannot write light-dark.png"),
        (["--json", "nowhere/report.json"], "argument --json: cannot write nowhere/report.json"),
        (["--json", "."], "argument --json: cannot write ."),
        (["--dump", "."], "argument --dump: must be a new or empty folder: ."),
        (["--dump", "of_a_user.py"], "argument --dump: must be a new or empty folder: of_a_user.py"),
        (["--compare", "'unchunked"], "argument --compare: No closing quotation: 'unchunked"),
    ],
)
def test_bad_arguments_are_one_line(capsys, folder, arguments, message):
    (folder / "light-dark.png").mkdir()
    status, lines = said(capsys, "linear_cross_entropy", *arguments)
    assert status == 2
    assert lines[-1].startswith(f"compiled-loss inspect: error: {message}")


def test_bad_arguments_of_compare(capsys):
    status, lines = said(capsys, "linear_cross_entropy", "--compare", "unchunked --json a.json")
    assert status == 2
    assert lines[-1] == "compiled-loss inspect --compare: error: unrecognized arguments: --json a.json"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], r"function: expected package.module:name or a public name of compiled_loss, got 'nothing': .*"),
        (["nowhere:f"], r"function: expected .*, got 'nowhere:f': No module named 'nowhere'"),
        (["of_a_user:number"], r"function: expected .*, got 'of_a_user:number': int is not callable"),
        (["of_a_user:Loss"], r"of_a_user:Loss is a class: name a function, or an instance .*"),
        (["that_raises:f"], r"that_raises:f: its import raised ZeroDivisionError: division by zero"),
        (
            ["that_imports:f"],
            r"that_imports:f: its import raised ModuleNotFoundError: .* 'nowhere_at_all'",
        ),
        (["that_misses:f"], r"that_misses:f: its import raised AttributeError: module 'of_a_user' has no attribute .*"),
        (["of_a_user:plain"], r"of_a_user:plain: needs --inputs, such as --inputs .*"),
        (["Chunking"], r"Chunking is a class: .*"),
        (["of_a_user:plain", "--inputs", "bf16[8,4"], r"inputs: expected dtype\[size,size\] .*, got 'bf16\[8,4'"),
        (["of_a_user:plain", "--inputs", "f32[4] f32[4] ?"], r"inputs: expected a tensor such as .*, got '\?'"),
        (["of_a_user:plain", "--inputs", "f32[4]"], r"of_a_user:plain: missing a required argument: 'weight', .*"),
        (["of_a_user:plain", "--inputs", "f32[4]", "--vocab", "3"], r"--vocab: inputs of of_a_user:plain are those .*"),
        (["of_a_user:loss", "--inputs", "f32[4] 3"], r"of_a_user:loss: too many positional arguments, with 2 inputs.*"),
        (["of_a_user:loss", "--inputs", "f32[4]", "--option", "a=1"], r"--option: of_a_user:loss is a Module, .*"),
        (["linear_cross_entropy", "--option", "zloss=1"], r".*got an unexpected keyword argument 'zloss'.*"),
        (["linear_cross_entropy", "--inductor", "nothing=1"], r"--inductor: torch \S+ has no nothing"),
        (["linear_cross_entropy", "--compare", "nowhere:f"], r"function: expected .*No module named 'nowhere'"),
        (["cross_entropy", "--strategy", "vocab"], r"--strategy: cross_entropy takes no chunking"),
        (["linear_cross_entropy", "--chunk-size", "8", "--memory-budget", "8"], r"memory_budget: expected .*"),
    ],
)
def test_impossible_calls_are_one_line(capsys, folder, monkeypatch, arguments, message):
    monkeypatch.setattr(command, "find_spec", lambda name: name)
    monkeypatch.setattr(command, "_inspect", lambda *given: pytest.fail("this is known before the work"))
    status, lines = said(capsys, *arguments)
    assert status == 1
    assert len(lines) == 1
    assert re.fullmatch(f"compiled-loss: {message}", lines[0])


def test_missing_extras_are_one_line(capsys, folder, monkeypatch):
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    install = "pip install 'compiled-loss[inspect]'"
    assert said(capsys, "unchunked") == (1, [f"compiled-loss: inspect needs rich, cloudpickle: {install}"])
    _, (line,) = said(capsys, "unchunked", "--plot", "memory.png", "--dump", "files")
    assert line == f"compiled-loss: inspect needs rich, cloudpickle, matplotlib: {install}"
    assert not (folder / "files").exists()


def test_help_needs_no_extra(capsys, monkeypatch):
    for name in ("rich", "cloudpickle", "matplotlib", "triton"):
        monkeypatch.setitem(sys.modules, name, None)
    for arguments in (["--help"], ["inspect", "--help"]):
        with pytest.raises(SystemExit) as exit:
            cli.main(arguments)
        assert not exit.value.code
    assert "--compare OTHER" in capsys.readouterr().out
