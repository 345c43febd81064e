"""`compiled-loss inspect`: what its words mean, and once as a user starts it."""

import argparse
import functools
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from inspecting import png_size

import compiled_loss
from compiled_loss import Chunking
from compiled_loss.inspection import command
from compiled_loss.inspection.cases import cases_of
from compiled_loss.inspection.record import Inspection

ROOT = Path(__file__).parents[2]
OURS = "bf16[8192,4096]:grad", "bf16[131072,4096]:grad", "int64[8192]:0..131071"


def cases(*arguments):
    parser = argparse.ArgumentParser()
    command.add(parser.add_subparsers())
    return cases_of(parser.parse_args(["inspect", *arguments]))


def inputs(case):
    return tuple(map(str, case.inputs))


def test_public_function():
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


def test_function_of_the_user(folder):
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


def test_tensor_option_is_an_input():
    """What is differentiated must be one."""
    (case,) = cases("linear_cross_entropy", "--option", "bias=f32[131072]:grad", "--option", "z_loss=0.5")
    assert inputs(case) == (*OURS, "f32[131072]:grad")
    hidden, weight, bias = torch.randn(4, 3), torch.randn(7, 3), torch.randn(7)
    labels = torch.tensor([0, 3, 6, 2])
    expected = compiled_loss.linear_cross_entropy(hidden, weight, labels, bias=bias, z_loss=0.5)
    torch.testing.assert_close(case.fn(hidden, weight, labels, bias), expected, rtol=0, atol=0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, and the file can be imported here")
def test_file_that_needs_a_gpu(folder):
    (case,) = cases("on_the_gpu:step", "--inputs", "f32[4,2]", "--loss", "step", "--loss", "layer")
    assert (case.label, case.fn.__name__, case.loss) == ("step", "step", ("step", "layer"))
    find, (name,) = case.fn.__reduce__()
    assert name == "on_the_gpu:step"
    with pytest.raises(Exception, match=r"CUDA|NVIDIA"):  # here as well, and not said to be the name's fault
        find(name)


def test_unchunked():
    hidden, weight, labels = torch.randn(4, 3), torch.randn(7, 3), torch.tensor([0, 3, 6, 2])
    (case,) = cases("unchunked", "--option", "label_smoothing=0.1")
    expected = F.cross_entropy(hidden @ weight.T, labels, label_smoothing=0.1)
    torch.testing.assert_close(case.fn(hidden, weight, labels), expected, rtol=0, atol=0)
    assert inputs(case) == OURS


def test_compare(folder):
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


def test_labels_of_compare():
    first, other = cases("cross_entropy", "--compare", "torch.nn.functional:cross_entropy")
    assert (first.label, other.label) == ("cross_entropy", "torch.nn.functional:cross_entropy")
    first, other = cases("unchunked", "--compare", "unchunked --inputs 'f32[8,4]:grad f32[9,4] int64[8]:0..8'")
    assert (first.label, other.label) == ("unchunked", "unchunked (2)")


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
    wrote = ["wrote report.json", "wrote memory.png", "wrote memory-dark.png"]
    wrote += ["wrote new/files/1/index.html", "wrote new/files/2/index.html"]
    assert done.stdout.splitlines()[-5:] == wrote
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
    for name in ("memory.png", "memory-dark.png"):
        width, height = png_size(folder / name)
        assert width > height > 500
