"""Which versions of torch are supported, and what others are told."""

import pytest
import torch

from compiled_loss import checks


@pytest.mark.parametrize("version", ["1.13.1", "2.9.0", "2.10.1", "2.10.0a0+git123"])
def test_unsupported_torch_version(version):
    with pytest.raises(checks.UnsupportedTorchError) as raised:
        checks.torch_version(version)
    assert str(raised.value) == f"compiled_loss: expected torch >= 2.11, got {version}: pip install 'torch>=2.11'"
    assert isinstance(raised.value, ImportError)
    assert isinstance(raised.value, ValueError)


@pytest.mark.parametrize("version", ["2.11.0", "2.13.0+cpu", "2.100.0", "3.0.0a0", torch.__version__])
def test_supported_torch_version(version):
    checks.torch_version(version)
