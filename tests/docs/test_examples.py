"""Each example runs, says what it promises, and explains itself, for every file of the folder."""

import importlib.util
import math
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
NEEDS = {"train_accelerate": "accelerate", "train_lightning": "lightning"}
EXAMPLES = [
    pytest.param(
        path,
        id=path.stem,
        marks=pytest.mark.skipif(
            path.stem in NEEDS and importlib.util.find_spec(NEEDS[path.stem]) is None, reason="its package is absent"
        ),
    )
    for path in sorted((ROOT / "examples").glob("*.py"))
]
needs_gloo = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo for processes on CPUs")

# Lines in this order, with others between them.
PROMISED = {
    "grpo": [
        r"step  reward  KL to the reference  clipped  entropy",
        r" +1 +\d\.\d{3} +\d\.\d{4} +\d\.\d{3} +\d\.\d{3}",
        r"mean reward of the first and of the last tenth of the steps: \d\.\d{3}, \d\.\d{3}",
    ],
    "dpo": [
        r"\d+ pairs of 256 prompts",
        r"step  chosen  rejected  margin  accuracy    loss",
        r" +1 +-?\d\.\d{3} +-?\d\.\d{3} +-?\d\.\d{3} +\d\.\d{3} +\d\.\d{4}",
        r"mean quality of continuations before and after: \d\.\d{3}, \d\.\d{3}",
    ],
    "gradient_accumulation": [
        r"sums / num_label_tokens +\d\.\de-0[6-9]",
        r"mean of means +\d\.\de-0[12]",
        r"step +2/2 +loss \d\.\d+",
    ],
    "distillation": [
        r"before: forward_kl \d\.\d+ nats, same choice for \d+\.\d% of tokens",
        r"student step +2/2 +loss \d\.\d+",
        r"after: forward_kl \d\.\d+ nats, same choice for \d+\.\d% of tokens",
    ],
    "eagle_draft": [
        r"acceptance before: \d+\.\d% \(at most \d+\.\d%\)",
        r"draft step +2/2 +loss \d\.\d+",
        r"acceptance after: \d+\.\d% \(at most \d+\.\d%\)",
    ],
    "multi_token_prediction": [
        r"main \d+, depth 0 \d+, depth 1 \d+",
        r"step +2/2 +main \d\.\d+ +depth 0 \d\.\d+ +depth 1 \d\.\d+",
    ],
    "recipes": [
        r"recipe +GEMMs +loss +cross-entropy",
        r"focal +3\.00 +\d\.\d+ +\d\.\d+ +\d\.\d+ +\d\.\d+",
        r"unlikelihood +4\.\d\d .*",
        r"list_mle +0\.\d\d .*",
    ],
    "train_accelerate": [
        r"step +1/2 +loss 6\.\d{6}",
        r"step +2/2 +loss 6\.\d{6}",
    ],
    "train_lightning": [
        r"step +2 +loss 6\.\d{3} +entropy 6\.\d{3} +accuracy 0\.\d{3}",
        r"step +10 +loss [345]\.\d{3} +entropy \d\.\d{3} +accuracy 0\.\d{3}",
    ],
    "train_tensor_parallel": [
        r"logits of a rank that are never held: \[2048, 4096\]",
        r"step +2/2 +loss \d\.\d+",
    ],
}

# Inductor stops after the partition, for g++ would take ten seconds and more.
WITHOUT_CODE_GENERATION = """
import functools, runpy, sys
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor import compile_fx
compile_fx.compile_fx = functools.partial(
    compile_fx.compile_fx, inner_compile=lambda module, inputs, **keywords: make_boxed_func(module)
)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""

# What a user sees, without the minute that compiling a model takes; the slow test waits for it.
WITHOUT_COMPILING = """
import runpy, sys, torch
torch.compiler.set_stance("force_eager")
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""

# Processes each of which ends itself: torchrun's are sessions of their own, so that no signal reaches them all.
RANKS = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
CODE = ["--no-python", sys.executable, "-c"]
LIMITED = "import faulthandler; faulthandler.dump_traceback_later({}, exit=True)\n"
WITH_CODE = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"


def run(folder, *command, options=("--steps", "2"), limit=300):
    """What it prints, from a folder that is not the project's."""
    device = ["--device", "cpu"] if has_device(command[-1]) else []
    process = subprocess.run(
        [sys.executable, *map(str, command), *device, *options],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},  # pytest-xdist fills the cores
        timeout=limit,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    noise = "No CUDA runtime is found"  # torch built for CUDA, where there is a toolkit and no GPU
    assert not [line for line in process.stderr.splitlines() if noise not in line]
    return process.stdout


def has_device(path):
    """Not the one that is a pipeline of processes on CPUs."""
    return "--device" in path.read_text(encoding="utf-8")


def kept(path, output):
    return re.search(r"\n(?s:.*)".join(PROMISED.get(path.stem, [r"loss\D*\d+\.\d"])), output)


@pytest.mark.parametrize("path", EXAMPLES)
def test_example(path, tmp_path):
    output = run(tmp_path, "-c", WITHOUT_COMPILING, path)
    assert kept(path, output), output


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES)
def test_example_with_inductor(path, tmp_path):
    output = run(tmp_path, path)
    assert kept(path, output), output


def compare_with_one_process(folder, code, compiled, limit):
    """Losses of 2 x 2 ranks differ by rounding alone from those of one process.

    A gradient sums products of 2048 tokens in fp32: either side's is off by about sqrt(2048) 2^-24 of itself, and what
    the steps gain by as much. A loss near 8 has a spacing of 2^-20, and 6 digits are printed.
    """
    path, options = ROOT / "examples" / "train_tensor_parallel.py", ("--steps", "5", "--compile", compiled)
    commands = ["-c", code], [*RANKS, "4", *CODE, LIMITED.format(limit) + code]
    outputs = [run(folder, *command, path, options=options, limit=limit + 50) for command in commands]
    one, ranks = ([float(loss) for loss in re.findall(r"loss (\d\.\d{6})", output)] for output in outputs)
    assert len(one) == len(ranks) == 5 and one[-1] < one[0] - 0.5
    for expected, loss in zip(one, ranks, strict=True):
        assert abs(loss - expected) <= 2 * math.sqrt(2048) * 2**-24 * (one[0] - expected) + 2 * 2**-20 + 1e-6


@needs_gloo
@pytest.mark.slow
def test_ranks_train_as_one_process(tmp_path):
    compare_with_one_process(tmp_path, WITHOUT_CODE_GENERATION, "loss", limit=200)


@needs_gloo
@pytest.mark.slow
def test_ranks_train_as_one_process_with_inductor(tmp_path):
    compare_with_one_process(tmp_path, WITH_CODE, "all", limit=900)


@needs_gloo
@pytest.mark.slow
def test_accelerate_trains_as_one_process(tmp_path):
    """Each loss near 6 has a spacing of 2^-21, 6 digits are printed, and gradients are off as above, of 1024 tokens."""
    pytest.importorskip("accelerate")
    path, options = ROOT / "examples" / "train_accelerate.py", ("--steps", "6")
    commands = ["-c", WITH_CODE], [*RANKS, "2", *CODE, LIMITED.format(200) + WITH_CODE]
    outputs = [run(tmp_path, *command, path, options=options, limit=250) for command in commands]
    one, ranks = ([float(loss) for loss in re.findall(r"loss (\d\.\d{6})", output)] for output in outputs)
    assert len(one) == len(ranks) == 6 and one[-1] < one[0] - 0.5
    for expected, loss in zip(one, ranks, strict=True):
        assert abs(loss - expected) <= 2 * math.sqrt(1024) * 2**-24 * (one[0] - expected) + 2 * 2**-21 + 1e-6


@pytest.mark.parametrize("path", EXAMPLES)
def test_help_and_wrong_options(path, monkeypatch, capsys):
    """Its own docstring and the options; a wrong one is one line."""
    wrong = {"--steps": "few"} | ({"--device": "abacus"} if has_device(path) else {})
    for options, status in ((["--help"], 0), *((pair, 2) for pair in wrong.items())):
        monkeypatch.setattr(sys, "argv", [str(path), *options])
        with pytest.raises(SystemExit) as exit:
            runpy.run_path(str(path), run_name="__main__")
        assert exit.value.code == status
        said = capsys.readouterr()
        if status:
            assert re.match(f"{path.name}: error: argument {options[0]}: invalid", said.err.splitlines()[-1])
        else:
            docstring = path.read_text(encoding="utf-8").split('"""')[1]
            assert docstring.strip() in said.out
            assert all(option in said.out for option in wrong)
