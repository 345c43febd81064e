"""Contract: a bad input is refused before any work, in words that begin with its name and say what came instead."""

import inspect
import re
from contextlib import nullcontext

import pytest
import torch
from invalid_arguments import CASES, FUNCTIONS, H, N, V, arguments, zeros
from operators import no_operators
from torch import float16, float64, int32, int64

import compiled_loss
from compiled_loss import Chunking

ALL = [
    pytest.param(function, *case, id=f"{name}-{case[2][:60]}")
    for case in CASES
    for name, function in FUNCTIONS.items()
    if case[0].keys() <= inspect.signature(function).parameters.keys()
]


@pytest.mark.parametrize(("function", "changed", "error", "text"), ALL)
def test_invalid_arguments(function, changed, error, text):
    given = {**arguments(function), **changed}
    read = "0 <= label < V" in text  # the one error that says what is in a tensor
    with nullcontext() if read else no_operators(), pytest.raises(error) as raised:
        function(**given)
    assert str(raised.value) == text
    assert re.match(r"\w+: expected .*, got ", text)


@pytest.mark.parametrize(
    ("changed", "error", "text"),
    [
        ({"chunking": "tokens"}, TypeError, "chunking: expected a Chunking, got str"),
        ({"chunking": None}, TypeError, "chunking: expected a Chunking, got NoneType"),
        ({"softcap": "30"}, TypeError, "softcap: expected a number or None, got str"),
        ({"softcap": float("inf")}, ValueError, "softcap: expected a number > 0 or None, got inf"),  # the loss is NaN
        ({"temperature": None}, TypeError, "temperature: expected a number, got NoneType"),
        ({"label_smoothing": None}, TypeError, "label_smoothing: expected a number, got NoneType"),
        ({"z_loss": None}, TypeError, "z_loss: expected a number, got NoneType"),
        (
            {"hidden": zeros(H), "labels": zeros(dtype=int64), "shift": 1},
            ValueError,
            "shift: expected 0 where labels have no dimension, got 1",
        ),
    ],
)
def test_invalid_arguments_of_linear_cross_entropy(changed, error, text):
    function = compiled_loss.linear_cross_entropy
    given = {**arguments(function), **changed}
    with no_operators(), pytest.raises(error) as raised:
        function(**given)
    assert str(raised.value) == text


@pytest.mark.parametrize(
    "changed",
    [
        {"reduction": "avg"},
        {"label_smoothing": 2.0},
        {"num_label_tokens": -1, "reduction": "sum"},
        {"chunking": 4},
        {"shift": -1},
        {"softcap": -1},
        {"class_weights": zeros(V + 1)},
        {"mask": zeros(2)},
        {"bias": zeros(V + 1)},
    ],
)
def test_nothing_is_cast_before_an_error(changed):
    function = compiled_loss.linear_cross_entropy
    given = {**arguments(function), **changed}
    with torch.autocast("cpu"), no_operators(), pytest.raises((TypeError, ValueError)):
        function(**given)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_parameter_has_an_error_case(name):
    tried = {next(iter(case.values[1])) for case in ALL if case.values[0] is FUNCTIONS[name]}
    parameters = inspect.signature(FUNCTIONS[name]).parameters.values()
    assert tried >= {p.name for p in parameters if p.kind is not p.VAR_POSITIONAL}  # test_token_functions.py has those


@pytest.mark.parametrize("name", FUNCTIONS)
def test_valid_arguments_at_the_bounds(name):
    """The other side of every bound."""
    function, parameters = FUNCTIONS[name], inspect.signature(FUNCTIONS[name]).parameters
    for changed in (
        {"labels": torch.tensor([0, -100, V - 1])},
        {"mask": zeros()},
        {"mask": zeros(1, dtype=torch.bool)},
        {"token_weights": zeros(N, dtype=int64)},
        {"class_weights": zeros(V, dtype=float64)},
        {"bias": zeros(V, dtype=float16)},
        {"shift": 0},
        {"shift": 100},
        {"ignore_index": -1},
        {"label_smoothing": 0},
        {"label_smoothing": 1},
        {"z_loss": 0},
        {"temperature": 1},
        {"logit_scale": 1},
        {"softcap": 1},
        {"num_label_tokens": 0, "reduction": "sum"},
        {"num_label_tokens": torch.ones(1, 1), "reduction": "sum"},
        {"chunking": Chunking(strategy="tokens", memory_budget=20)},
        {"chunking": Chunking(strategy="vocab", memory_budget=12)},
        {"chunking": Chunking(accumulate_dtype=float64)},
    ):
        if changed.keys() <= parameters.keys():
            function(**{**arguments(function), **changed})


TOKENS = Chunking(strategy="tokens")


@pytest.mark.parametrize(
    ("name", "changed", "text"),
    [
        ("cross_entropy", {"labels": zeros(N, dtype=int32)}, "labels: expected int64, got torch.int32"),
        ("cross_entropy", {"labels": zeros(2, dtype=int64)}, "labels: expected the shape of logits without its last"),
        ("cross_entropy", {"reduction": "average"}, "reduction: expected one of 'none', 'sum', 'mean', got 'average'"),
        ("cross_entropy", {"softcap": 0.0}, "softcap: expected a number > 0 or None, got 0.0"),
        ("cross_entropy", {"num_label_tokens": 3}, "num_label_tokens: expected None unless reduction='sum'"),
        ("linear_cross_entropy", {"hidden": zeros(N, 9)}, "hidden: expected [..., H] with H = 4"),
        ("linear_cross_entropy", {"weight": zeros(V, H, dtype=float64)}, "call under torch.autocast"),
        ("linear_cross_entropy", {"class_weights": zeros(V).requires_grad_()}, "use class_weights.detach()"),
        (
            "linear_cross_entropy",
            {"hidden": zeros(N, H).requires_grad_(), "reduction": "none", "chunking": TOKENS},
            "strategy: expected 'vocab' or 'auto', got 'tokens'",
        ),
        (
            "linear_cross_entropy_with_statistics",
            {"chunking": Chunking(strategy="tokens", memory_budget=4)},
            "memory_budget: expected at least 20 bytes, one token of logits, got 4",
        ),
        ("linear_token_statistics", {"shift": -1}, "shift: expected an int >= 0, got -1"),
    ],
)
def test_error_text_compiled(name, changed, text):
    """Inside an exception of Dynamo's own type."""
    function = FUNCTIONS[name]
    compiled = torch.compile(lambda given: function(**given), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=re.escape(text)):
        compiled({**arguments(function), **changed})


@pytest.mark.parametrize("name", FUNCTIONS)
def test_ignored_token_takes_any_label(name):
    function = FUNCTIONS[name]
    given = arguments(function)
    given["labels"] = torch.tensor([V, 1, -7])
    mask = torch.tensor([0.0, 1.0, 0.0])
    valid = {**given, "labels": torch.tensor([0, 1, 0]), "mask": mask}
    torch.testing.assert_close(function(**given, mask=mask), function(**valid), rtol=0, atol=0)
    # Position 0's label is nobody's target when position t predicts label t + 1.
    if "shift" in inspect.signature(function).parameters:
        function(**{**given, "labels": torch.tensor([V, 1, 2])}, shift=1)
