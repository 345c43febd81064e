import sys

import pytest

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
