"""The logits of a chunk, which a CPU computes a few classes at a time."""

import pytest
import torch

from compiled_loss.engine import gemm


@pytest.mark.parametrize("classes", [511, 512, 513, 1500])
@pytest.mark.parametrize("rows", [1, 7])
def test_logits_of_any_number_of_classes(rows, classes):
    torch.manual_seed(0)
    hidden, weight = torch.randn(rows, 5), torch.randn(classes, 5)
    found = gemm.logits(hidden, weight, out=torch.full((rows, classes), float("nan")))
    torch.testing.assert_close(found.double(), hidden.double() @ weight.double().t(), rtol=1e-5, atol=1e-5)
