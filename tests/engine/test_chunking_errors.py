"""What Chunking and the two strategies refuse."""

from functools import partial

import pytest
import torch
from torch import int64

import compiled_loss
from compiled_loss import Chunking, reference
from compiled_loss.testing import head_inputs

N, H, V = 3, 4, 5


def test_memory_budget_that_only_vocab_can_keep():
    """Three columns of [64, 1000] fit where no row does."""
    hidden, weight, labels, _ = head_inputs(64, H, 1000)
    chunking = Chunking(memory_budget=3 * 64 * 4)
    expected = reference.linear_cross_entropy(hidden, weight, labels)
    torch.testing.assert_close(compiled_loss.linear_cross_entropy(hidden, weight, labels, chunking=chunking), expected)


TEXT = "memory_budget: expected a number of bytes or a text such as '512MiB' or '1.5 GiB', "
MOST = "max_label_tokens: expected an int >= 1, a float above 0 and up to 1, or None, "


@pytest.mark.parametrize(
    ("fields", "error", "text"),
    [
        ({"strategy": "rows"}, ValueError, "strategy: expected one of 'auto', 'tokens', 'vocab', got 'rows'"),
        ({"strategy": None}, ValueError, "strategy: expected one of 'auto', 'tokens', 'vocab', got None"),
        ({"chunk_size": 0}, ValueError, "chunk_size: expected an int >= 1 or None, got 0"),
        ({"chunk_size": -4}, ValueError, "chunk_size: expected an int >= 1 or None, got -4"),
        ({"chunk_size": True}, TypeError, "chunk_size: expected an int >= 1 or None, got bool"),
        ({"chunk_size": 8.0}, TypeError, "chunk_size: expected an int >= 1 or None, got float"),
        ({"memory_budget": 0}, ValueError, "memory_budget: expected an int >= 1 or None, got 0"),
        ({"memory_budget": "0MiB"}, ValueError, "memory_budget: expected an int >= 1 or None, got 0"),
        ({"memory_budget": "\N{SUPERSCRIPT TWO}GiB"}, ValueError, TEXT + "got '\N{SUPERSCRIPT TWO}GiB'"),
        ({"memory_budget": "1GB"}, ValueError, TEXT + "got '1GB'"),
        ({"memory_budget": "GiB"}, ValueError, TEXT + "got 'GiB'"),
        ({"memory_budget": "-1GiB"}, ValueError, TEXT + "got '-1GiB'"),
        ({"memory_budget": "1024"}, ValueError, TEXT + "got '1024'"),
        ({"memory_budget": 1e9}, TypeError, "memory_budget: expected an int >= 1 or None, got float"),
        (
            {"memory_budget": 1 << 20, "chunk_size": 8},
            ValueError,
            "memory_budget: expected None where chunk_size is given, got both: they say the same thing",
        ),
        ({"max_label_tokens": 0}, ValueError, MOST + "got 0"),
        ({"max_label_tokens": 1.5}, ValueError, MOST + "got 1.5"),
        ({"max_label_tokens": 0.0}, ValueError, MOST + "got 0.0"),
        ({"max_label_tokens": float("nan")}, ValueError, MOST + "got nan"),
        ({"max_label_tokens": True}, TypeError, MOST + "got bool"),
        ({"max_label_tokens": "half"}, TypeError, MOST + "got str"),
        (
            {"accumulate_dtype": int64},
            TypeError,
            "accumulate_dtype: expected a floating torch.dtype or None, got torch.int64",
        ),
        (
            {"accumulate_dtype": "float32"},
            TypeError,
            "accumulate_dtype: expected a floating torch.dtype or None, got 'float32'",
        ),
        ({"compile": "always"}, ValueError, "compile: expected True, False or 'auto', got 'always'"),
        ({"compile": None}, ValueError, "compile: expected True, False or 'auto', got None"),
    ],
)
def test_chunking_fields(fields, error, text):
    with pytest.raises(error) as raised:
        Chunking(**fields)
    assert str(raised.value) == text


TOKENS = Chunking(strategy="tokens")


@pytest.mark.parametrize("wants", ["hidden", "weight", "bias"])
def test_tokens_strategy_has_no_gradients_per_token(wants):
    hidden, weight, labels, bias = (v.detach() for v in head_inputs(N, H, V))
    {"hidden": hidden, "weight": weight, "bias": bias}[wants].requires_grad_()
    what = "reduction='none' with a gradient"
    for function in (compiled_loss.linear_cross_entropy, compiled_loss.linear_cross_entropy_with_statistics):
        call = partial(function, hidden, weight, labels, bias=bias, reduction="none", chunking=TOKENS)
        with pytest.raises(ValueError, match=rf"^strategy: expected 'vocab' or 'auto', got 'tokens', .*{what}"):
            call()
        with torch.no_grad():
            call()
    with pytest.raises(ValueError, match=r"^strategy: expected 'vocab' or 'auto', got 'tokens', .*statistics"):
        compiled_loss.linear_token_statistics(hidden, weight, labels, bias=bias, chunking=TOKENS)
    with torch.no_grad():
        compiled_loss.linear_token_statistics(hidden, weight, labels, bias=bias, chunking=TOKENS)
