"""The page on scaling: its model by hand, and its figures those of the raw results."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from compiled_loss.inspection.network import Link, Network

ROOT = Path(__file__).parents[2]
SLOW = Network(
    node=8,
    within=Link(bytes_per_second=100, step_seconds=1, source=""),
    across=Link(bytes_per_second=10, step_seconds=10, source=""),
    call_seconds=1000,
)


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("scaling_tool", ROOT / "tools" / "scaling.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_figures_match_the_raw_results():
    command = [sys.executable, ROOT / "tools" / "figures.py", "--check"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


@pytest.fixture
def made(tool):
    """Eight tokens, of which 8 ranks compute a second each and send 800 bytes twice."""
    twice = [{"kind": "all-reduce", "size": 800, "ranks": 8, "count": 2}]
    rows = ((1, 8, 8.0, []), (8, 8, 1.0, twice), (8, 4, 0.5, twice))
    lines = [
        {"strategy": "tokens", "ranks": r, "tokens": n, "shape": f"{n}x4x16", "seconds": s, "collectives": c}
        for r, n, s, c in rows
    ]
    scaling = tool.Scaling(lines)
    scaling.network = SLOW
    return scaling


def test_hand_computed_times(made):
    """dW's 16 bytes of a rank over two replicas of 8 ranks, each a node; all 128 bytes over 16, 8 on each node."""
    sent = 2 * (1000 + 14 + 1400 / 100)
    assert made.strong("tokens", 1, 1) == made.weak("tokens", 1, 1) == 8
    assert made.strong("tokens", 8, 1) == pytest.approx(1 + sent)
    assert made.weak("tokens", 8, 1) == pytest.approx(8 * (1 + sent))
    assert made.reduced(8, 2) == pytest.approx(1000 + 2 * 10 + 16 / 10)
    assert made.reduced(1, 16) == pytest.approx(1000 + 14 + 2 * 10 + 240 / 80)
    assert made.strong("tokens", 8, 2) == pytest.approx(0.5 + sent + made.reduced(8, 2))
    assert made.weak("tokens", 8, 2) == pytest.approx(8 * (1 + sent) + made.reduced(8, 2))
    assert made.curve(made.weak, "tokens", 8) == [8, pytest.approx(8 * (1 + sent))]


def test_what_was_read(tool):
    """Work is shared evenly; the largest of what is sent is dH, and all ranks take part."""
    found = tool.read()
    whole = found.tokens * found.width * found.vocab
    assert found.gpus == [2**i for i in range(11)]
    for (strategy, ranks, tokens), row in found.rows.items():
        gemms = 8 if strategy == "vocab" else 6
        assert row["operations"] * ranks * found.tokens == gemms * whole * tokens
        sent = [one for one, _ in found.collectives(strategy, ranks, tokens)]
        assert {one.ranks for one in sent} == ({ranks} if ranks > 1 else set())
        assert not sent or max(one.size for one in sent) == 2 * tokens * found.width
        assert row["device"].startswith("no GPU")
