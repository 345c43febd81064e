"""Chunking is a value: frozen, hashable, budgets in words, and rows of max_label_tokens."""

import dataclasses
import inspect

import pytest
import torch
from torch import bfloat16, float32

from compiled_loss import Chunking, linear_cross_entropy
from compiled_loss.planner.plan import Plan, plan

PLAN = Plan(strategy="tokens", chunk=1, count=1, accumulate_dtype=float32)


@pytest.mark.parametrize("value", [Chunking(chunk_size=8), PLAN])
def test_frozen_hashable_and_keyword_only(value):
    fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
    again = type(value)(**fields)
    assert again == value
    assert again is not value
    assert hash(again) == hash(value)
    assert {p.kind for p in inspect.signature(type(value)).parameters.values()} == {inspect.Parameter.KEYWORD_ONLY}
    for name in fields:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, name, None)
    assert not hasattr(value, "__dict__")  # a misspelt field is an error too
    assert eval(repr(value), {type(value).__name__: type(value), "torch": torch}) == value  # what a log shows is code


@pytest.mark.parametrize(
    ("tokens", "part", "rows"),
    [
        (10, 0.3, 3),
        (1000, 0.3, 300),
        (1001, 0.3, 301),
        (7, 0.5, 4),
        (3, 1 / 3, 1),
        (98304, 2 / 3, 65536),
        (3_000_000, 1 / 3, 1_000_000),
        (2, 1e-12, 1),
        (32769, 0.999, 32737),
    ],
)
def test_max_label_tokens_fraction_is_rounded_up(tokens, part, rows):
    assert Chunking(max_label_tokens=part).rows(tokens) == rows


@pytest.mark.parametrize(("tokens", "part"), [(0, 0.5), (1, 0.1), (9, 1.0)])
def test_max_label_tokens_fraction_of_all_tokens(tokens, part):
    assert Chunking(max_label_tokens=part).rows(tokens) is None


@pytest.mark.parametrize(
    ("text", "size"), [("3KiB", 3 << 10), ("512MiB", 512 << 20), ("1.5 GiB", 3 << 29), (" 2GiB ", 2 << 30), (77, 77)]
)
def test_memory_budget_in_words(text, size):
    assert Chunking(memory_budget=text).budget == size
    sizes = (8192, 4096, 131072, bfloat16)
    if size >= 1 << 20:
        assert plan(*sizes, Chunking(memory_budget=text)) == plan(*sizes, Chunking(memory_budget=size))


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("budget", ["1KiB", 1 << 12])
@pytest.mark.parametrize("strategy", ["auto", "tokens", "vocab"])
def test_memory_budget_compiled(strategy, budget, gradient):
    def loss(h, w, y):
        return linear_cross_entropy(h, w, y, chunking=Chunking(strategy=strategy, memory_budget=budget))

    h, w, y = torch.randn(40, 4, requires_grad=gradient), torch.randn(11, 4), torch.randint(11, (40,))
    torch.testing.assert_close(torch.compile(loss, fullgraph=True, backend="eager")(h, w, y), loss(h, w, y))


def test_max_label_tokens_count():
    assert Chunking(max_label_tokens=5).rows(6) == 5
    assert Chunking(max_label_tokens=6).rows(6) is None
    assert Chunking().rows(6) is None


def test_every_field_is_compared():
    distinct = [
        Chunking(),
        Chunking(strategy="vocab"),
        Chunking(chunk_size=1024),
        Chunking(memory_budget=1024),
        Chunking(accumulate_dtype=float32),
        Chunking(max_label_tokens=0.5),
        Chunking(compile=True),
        Chunking(compile=False),
    ]
    assert len(set(distinct)) == len(distinct) == sum(f.init for f in dataclasses.fields(Chunking)) + 2
