"""`compiled-loss inspect`: what its words mean, what it says of wrong ones, and once as a user starts it."""

import argparse
import functools
import json
import os
import re
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import compiled_loss
from compiled_loss import Chunking, cli
from compiled_loss.inspection import command
from compiled_loss.inspection.cases import cases_of
from compiled_loss.inspection.record import Inspection

ROOT = Path(__file__).parents[2]
OURS = "bf16[8192,4096]:grad", "bf16[131072,4096]:grad", "int64[8192]:0..131071"
MODULE = """
import torch


class Loss(torch.nn.Module):
    def forward(self, x):
        return x.sum()


def plain(hidden, weight, labels, scale=1.0):
    return scale * torch.nn.functional.cross_entropy((hidden @ weight.T).float(), labels)


loss = Loss()
number = 3
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with a user's module, which is imported anew."""
    (tmp_path / "of_a_user.py").write_text(MODULE)
    (tmp_path / "that_raises.py").write_text("1 / 0")
    (tmp_path / "that_imports.py").write_text("import nowhere_at_all")
    (tmp_path / "that_misses.py").write_text("import of_a_user\nof_a_user.nothing")
    (tmp_path / "on_the_gpu.py").write_text(
        "import torch\nlayer = torch.nn.Linear(2, 2, device='cuda')\n\n\ndef step(x):\n    return layer(x).sum()\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "of_a_user", raising=False)
    return tmp_path


def cases(*arguments):
    parser = argparse.ArgumentParser()
    command.add(parser.add_subparsers())
    return cases_of(parser.parse_args(["inspect", *arguments]))


def inputs(case):
    return tuple(map(str, case.inputs))


# Words ---------------------------------------------------------------------------------------------------------------


def test_a_public_function_needs_nothing():
    (case,) = cases("linear_cross_entropy")
    assert (case.fn, case.label) == (compiled_loss.linear_cross_entropy, "linear_cross_entropy")
    assert (case.device, case.backward, case.dynamic, case.inductor) == ("cuda:sm_90", True, None, None)
    assert inputs(case) == OURS


def test_sizes():
    sizes = "--tokens", "64", "--hidden", "32", "--vocab", "256", "--dtype", "float32"
    (linear,) = cases("linear_token_statistics", *sizes, "--device", "cpu", "--no-backward")
    assert inputs(linear) == ("f32[64,32]:grad", "f32[256,32]:grad", "int64[64]:0..255")
    assert (linear.device, linear.backward) == ("cpu", False)
    (logits,) = cases("cross_entropy", *sizes)
    assert inputs(logits) == ("f32[64,256]:grad", "int64[64]:0..255")


@pytest.mark.parametrize(
    "name", [n for n in compiled_loss.__all__ if re.fullmatch("[a-z_]*(entropy|statistics|distillation)", n)]
)
def test_every_public_loss_is_known(name):
    assert cases(name)[0].inputs[-1].shape == (8192,)  # labels, or a mask of positions


def test_a_function_of_the_user(folder):
    text = "bf16[8,4]:grad bf16[16, 4]:grad int64[8]:0..15 0.5"
    (case,) = cases("of_a_user:plain", "--inputs", text, "--dynamic", "--inductor", "epilogue_fusion=False")
    assert (case.fn.__name__, case.label) == ("plain", "plain dynamic=True epilogue_fusion=False")
    assert inputs(case) == ("bf16[8,4]:grad", "bf16[16,4]:grad", "int64[8]:0..15", "0.5")
    assert (case.dynamic, case.inductor) == (True, {"epilogue_fusion": False})
    assert isinstance(cases("of_a_user:loss", "--inputs", "f32[4]:grad")[0].fn, torch.nn.Module)


def test_options():
    (case,) = cases(
        "linear_cross_entropy",
        *("--option", 'reduction="none"', "--option", "z_loss=1e-4", "--option", "softcap=30"),
        *("--strategy", "vocab", "--chunk-size", "16384"),
    )
    assert isinstance(case.fn, functools.partial)
    assert case.fn.keywords == {
        "reduction": "none",
        "z_loss": 1e-4,
        "softcap": 30,
        "chunking": Chunking(strategy="vocab", chunk_size=16384),
    }
    assert case.fn.__name__ == case.label
    assert case.label == "linear_cross_entropy strategy=vocab chunk_size=16384 reduction=none z_loss=0.0001 softcap=30"
    assert cases("cross_entropy", "--option", "reduction=none")[0].fn.keywords == {"reduction": "none"}


def test_a_tensor_as_an_option_is_an_input():
    """What is differentiated must be one."""
    (case,) = cases("linear_cross_entropy", "--option", "bias=f32[131072]:grad", "--option", "z_loss=0.5")
    assert inputs(case) == (*OURS, "f32[131072]:grad")
    hidden, weight, bias = torch.randn(4, 3), torch.randn(7, 3), torch.randn(7)
    labels = torch.tensor([0, 3, 6, 2])
    expected = compiled_loss.linear_cross_entropy(hidden, weight, labels, bias=bias, z_loss=0.5)
    torch.testing.assert_close(case.fn(hidden, weight, labels, bias), expected, rtol=0, atol=0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, and the file can be imported here")
def test_a_file_that_needs_a_gpu_is_imported_elsewhere(folder):
    (case,) = cases("on_the_gpu:step", "--inputs", "f32[4,2]", "--loss", "step", "--loss", "layer")
    assert (case.label, case.fn.__name__, case.loss) == ("step", "step", ("step", "layer"))
    find, (name,) = case.fn.__reduce__()
    assert name == "on_the_gpu:step"
    with pytest.raises(Exception, match=r"CUDA|NVIDIA"):  # here as well, and not said to be the name's fault
        find(name)


def test_unchunked_is_the_ordinary_loss():
    hidden, weight, labels = torch.randn(4, 3), torch.randn(7, 3), torch.tensor([0, 3, 6, 2])
    (case,) = cases("unchunked", "--option", "label_smoothing=0.1")
    expected = F.cross_entropy(hidden @ weight.T, labels, label_smoothing=0.1)
    torch.testing.assert_close(case.fn(hidden, weight, labels), expected, rtol=0, atol=0)
    assert inputs(case) == OURS


def test_the_other_takes_what_is_called_and_not_how(folder):
    first, other = cases(
        *("linear_cross_entropy", "--tokens", "64", "--device", "cpu", "--no-backward", "--option", "z_loss=1e-4"),
        *("--inductor", "epilogue_fusion=False", "--compare", "linear_cross_entropy --strategy vocab --vocab 512"),
    )
    assert inputs(first)[2] == "int64[64]:0..131071"
    assert inputs(other)[2] == "int64[64]:0..511"
    assert (other.device, other.backward, other.inductor) == ("cpu", False, None)
    assert other.fn.keywords == {"chunking": Chunking(strategy="vocab")}
    assert other.label == "linear_cross_entropy strategy=vocab vocab=512"
    text = "bf16[8,4]:grad bf16[16,4]:grad int64[8]:0..15"
    for name in ("linear_cross_entropy", "unchunked"):
        first, other = cases("of_a_user:plain", "--inputs", text, "--compare", name)
        assert inputs(first) == inputs(other) == tuple(text.split())
        assert other.label == name
    first, other = cases("linear_cross_entropy", "--compare", "of_a_user:plain --option scale=2.0")
    assert inputs(first) == inputs(other) == OURS
    first, other = cases("cross_entropy", "--compare", "torch.nn.functional:cross_entropy --option reduction='sum'")
    assert inputs(first) == inputs(other) == ("bf16[8192,131072]:grad", "int64[8192]:0..131071")
    assert (first.label, other.label) == ("cross_entropy", "cross_entropy reduction=sum")


def test_labels_tell_two_apart():
    first, other = cases("cross_entropy", "--compare", "torch.nn.functional:cross_entropy")
    assert (first.label, other.label) == ("cross_entropy", "torch.nn.functional:cross_entropy")
    first, other = cases("unchunked", "--compare", "unchunked --inputs 'f32[8,4]:grad f32[9,4] int64[8]:0..8'")
    assert (first.label, other.label) == ("unchunked", "unchunked (2)")


# Wrong words ---------------------------------------------------------------------------------------------------------


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
        (["--json", "nowhere/report.json"], "argument --json: cannot write nowhere/report.json"),
        (["--json", "."], "argument --json: cannot write ."),
        (["--dump", "."], "argument --dump: must be a new or empty folder: ."),
        (["--dump", "of_a_user.py"], "argument --dump: must be a new or empty folder: of_a_user.py"),
        (["--compare", "'unchunked"], "argument --compare: No closing quotation: 'unchunked"),
    ],
)
def test_bad_arguments_are_one_line(capsys, folder, arguments, message):
    status, lines = said(capsys, "linear_cross_entropy", *arguments)
    assert status == 2
    assert lines[-1].startswith(f"compiled-loss inspect: error: {message}")


def test_bad_arguments_of_the_other(capsys):
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
def test_calls_that_cannot_be_are_one_line(capsys, folder, monkeypatch, arguments, message):
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


# The work ------------------------------------------------------------------------------------------------------------


def png_size(path):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert data[-8:-4] == b"IEND"
    return struct.unpack(">II", data[16:24])


def test_end_to_end(folder):
    """As a user starts it: in a process, from a folder of theirs, on a machine that need not have a GPU or triton."""
    for name in ("rich", "cloudpickle", "matplotlib"):
        pytest.importorskip(name)
    arguments = ["of_a_user:plain", "--inputs", "f32[64,32]:grad f32[256,32]:grad int64[64]:0..255"]
    arguments += ["--option", "scale=2.0", "--device", "cpu", "--no-measure", "--json", "report.json"]
    arguments += ["--compare", "linear_cross_entropy --chunk-size 16", "--plot", "memory.png", "--dump", "new/files"]
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "compiled_loss.cli", "inspect", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "100"},
    )
    seconds = time.monotonic() - start
    assert done.returncode == 0, done.stderr
    first, ours = "plain scale=2.0", "linear_cross_entropy chunk_size=16"
    assert done.stderr == f"inspecting {first} on cpu\ninspecting {ours} on cpu\n"
    assert re.search(rf"^ +{first} {ours} 2nd / 1st$", done.stdout, re.MULTILINE)
    wrote = ["wrote report.json", "wrote memory.png", "wrote new/files/1/index.html", "wrote new/files/2/index.html"]
    assert done.stdout.splitlines()[-4:] == wrote
    found = [Inspection.from_json(json.dumps(one)) for one in json.loads((folder / "report.json").read_text())]
    assert [one.name for one in found] == [first, ours]
    for one in found:
        assert (one.device, one.measured, one.breaks) == ("cpu", None, ())
        assert one.backward is not None
        assert 0 < one.seconds < seconds
    sizes = [size for one in found for size in (one.peak_bytes, one.saved_bytes)]
    logits, gradients = 4 * 64 * 256, 4 * (64 + 256) * 32
    assert logits + gradients <= sizes[0] < 1.1 * (logits + gradients)
    assert logits <= sizes[1] < 1.1 * logits
    assert logits // 4 + gradients <= sizes[2] < 1.1 * (logits // 4 + gradients)
    assert gradients <= sizes[3] < 1.1 * gradients
    assert [len(one.forward.gemms) for one in found] == [1, 12]  # of four chunks, three each
    for i, one in enumerate(found, 1):
        page = (folder / "new" / "files" / str(i) / "index.html").read_text()
        assert f"<title>{one.name}</title>" in page
        assert "graphs/00-forward-wrapper.py" in page
    width, height = png_size(folder / "memory.png")
    assert width > height > 500
