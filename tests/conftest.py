import pytest
import torch

from compiled_loss.engine import execution

pytest_plugins = ["compiled_loss.pytest_plugin"]


@pytest.fixture(autouse=True)
def _one_thread_and_fresh_caches():
    """pytest-xdist fills the cores; a compiled function of another test must not serve this one."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.compiler.reset()
    yield
    execution.forget()
