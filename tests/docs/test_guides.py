"""Every block of Python in the guides runs, one after the other, as a reader would type them."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GUIDES = ("your-own-loss.md", "reinforcement.md", "preferences.md", "distillation.md")


@pytest.mark.parametrize("name", GUIDES)
def test_blocks_run(name, capsys):
    text = (ROOT / "docs" / name).read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert blocks
    names = {"__name__": "guide"}
    for block in blocks:
        before = text[: text.index(block)].count("\n")
        exec(compile("\n" * before + block, str(ROOT / "docs" / name), "exec"), names)  # lines as in the file
    capsys.readouterr()
