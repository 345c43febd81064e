"""The release workflow runs what `.ci/run` does, on the versions of `make test-all`."""

import re
from pathlib import Path

import pytest

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).parents[2]
WORKFLOW = ROOT / ".github" / "workflows" / "release.yml"


@pytest.fixture(scope="module")
def jobs():
    if not WORKFLOW.is_file():
        pytest.skip("not a checkout")
    return yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))["jobs"]


def commands(job):
    return [step["run"] for step in job["steps"] if "run" in step]


def test_each_torch_is_tested(jobs):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    supported = re.findall(r"\$\(MAKE\) TORCH=(\S+) test-whole", makefile)
    assert jobs["test"]["strategy"]["matrix"]["torch"] == supported
    assert jobs["test"]["env"]["TORCH"] == "${{ matrix.torch }}"
    assert re.search(r"^TORCH \?= ", makefile, re.MULTILINE)  # make takes it from the environment
    assert commands(jobs["test"]) == [".ci/run"]


def test_only_what_was_tested_is_published(jobs):
    assert commands(jobs["wheel"])[0] == "make wheel"
    assert jobs["wheel"]["needs"] == "test" and jobs["publish"]["needs"] == "wheel"
    assert jobs["publish"]["if"] == "startsWith(github.ref, 'refs/tags/v')"
    assert jobs["publish"]["permissions"] == {"id-token": "write"}
