"""Multi-token prediction: targets under packing, one pass for all depths, one normalisation."""

import re
from functools import partial

import pytest
import torch
from comparing import TIGHT, assert_matches, assert_same
from hypothesis import given, settings
from hypothesis import strategies as st
from operators import no_operators

from compiled_loss import (
    Chunking,
    linear_cross_entropy,
    multi_token_losses,
    multi_token_prediction,
    multi_token_targets,
    reference,
)
from compiled_loss.testing import count_graphs, inputs_unchanged


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=4),
    st.integers(0, 3),
    st.integers(0, 6),
    st.sampled_from(["none", "cu_seqlens", "cu_seqlens 2-D", "seq_idx", "seq_idx of a row"]),
    st.sampled_from(["[B, S]", "[S]", "[1, T]"]),
)
def test_multi_token_targets_match_reference(lengths, tail, depth, packing, layout):
    size = sum(lengths) + tail
    labels = torch.randint(0, 50, {"[B, S]": (3, size), "[S]": (size,), "[1, T]": (1, size)}[layout])
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    ids = torch.repeat_interleave(torch.arange(len(lengths) + 1), torch.tensor([*lengths, tail]))
    options = {
        "none": {},
        "cu_seqlens": {"cu_seqlens": cu_seqlens},
        "cu_seqlens 2-D": {"cu_seqlens": cu_seqlens.int().unsqueeze(0)},
        "seq_idx": {"seq_idx": ids.int().expand(labels.shape), "cu_seqlens": torch.tensor([0, 1])},
        "seq_idx of a row": {"seq_idx": ids * 7 - 3},
    }[packing]
    with inputs_unchanged(labels):
        found = multi_token_targets(labels, depth, ignore_index=-1, **options)
    assert found.equal(reference.multi_token_targets(labels, depth, ignore_index=-1, **options))


def test_hand_computed_targets():
    """Tail padding is nobody's label and predicts nothing."""
    labels = torch.arange(10, 18)
    packed = {"cu_seqlens": torch.tensor([0, 3, 6])}
    assert multi_token_targets(labels, 0).tolist() == [11, 12, 13, 14, 15, 16, 17, -100]
    assert multi_token_targets(labels, 0, **packed).tolist() == [11, 12, -100, 14, 15, -100, -100, -100]
    assert multi_token_targets(labels, 1, **packed).tolist() == [12, -100, -100, 15, -100, -100, -100, -100]
    assert multi_token_targets(labels, 20).tolist() == [-100] * 8


def inputs(depths=3, dtype=torch.float64):
    hidden = [torch.randn(2, 7, 4, dtype=torch.float64).to(dtype).requires_grad_() for _ in range(depths)]
    weight = torch.randn(13, 4, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.where(torch.rand(2, 7) < 0.2, -100, torch.randint(0, 13, (2, 7)))
    return hidden, weight, labels


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scaling_factor": 0.3, "softcap": 5.0},
        {"num_label_tokens": 9},
        {"num_label_tokens": torch.tensor(0)},
        {"cu_seqlens": torch.tensor([0, 3, 6])},
        {"seq_idx": torch.tensor([0, 0, 0, 1, 1, 2, 2])},
    ],
    ids=str,
)
@pytest.mark.parametrize("strategy", ["tokens", "vocab"])
def test_multi_token_prediction_matches_reference(options, strategy):
    hidden, weight, labels = inputs()
    chunking = Chunking(strategy=strategy, chunk_size=5)
    loss = multi_token_prediction(hidden, weight, labels, chunking=chunking, **options)
    expected = reference.multi_token_prediction(hidden, weight, labels, **options)
    assert_same(loss, expected, [*hidden, weight])


def test_each_depth_has_its_own_count():
    """mtp.py: one denominator for every depth."""
    hidden, weight, labels = inputs()
    found = multi_token_losses(hidden, weight, labels, scaling_factor=0.5)
    alone = [linear_cross_entropy(states, weight, multi_token_targets(labels, k)) for k, states in enumerate(hidden)]
    torch.testing.assert_close(found.per_depth, torch.stack(alone), **TIGHT)
    torch.testing.assert_close(found.loss, 0.5 / 3 * sum(alone), **TIGHT)
    assert not found.per_depth.requires_grad


MASKS = {
    "a row": torch.tensor([1, 1, 0, 1, 0, 1, 1]),
    "bool": torch.rand(2, 7, generator=torch.Generator().manual_seed(3)) < 0.6,
    "fractions": torch.tensor([[0.5, 2.0, 0.0, 1.0, 0.25, 1.0, 0.0]], dtype=torch.float64),
    "a column": torch.tensor([[1.0], [0.5]], dtype=torch.float64),
    "one": torch.tensor(0.5, dtype=torch.float64),
    "nothing": torch.zeros(2, 1),
}


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("options", [{}, {"num_label_tokens": 9}, {"cu_seqlens": torch.tensor([0, 3, 6])}], ids=str)
def test_mask(kind, options):
    """It weighs a label, at whatever depth and place it is predicted from, and divides as `linear_cross_entropy`'s."""
    hidden, weight, labels = inputs()
    mask = MASKS[kind]
    everywhere = mask.double().expand(2, 7)
    found = multi_token_losses(hidden, weight, labels, scaling_factor=0.5, mask=mask, **options)
    packing = {name: value for name, value in options.items() if name == "cu_seqlens"}
    per_depth = []
    for k, states in enumerate(hidden):
        targets = reference.multi_token_targets(labels, k, **packing)
        moved = torch.zeros(2, 7, dtype=torch.float64)
        moved[:, : -k - 1] = everywhere[:, k + 1 :]
        rows = torch.nn.functional.cross_entropy((states @ weight.t()).transpose(1, 2), targets, reduction="none")
        total = (moved * (targets != -100)).sum()
        divisor = options.get("num_label_tokens", total if total > 0 else 1)
        per_depth.append((rows * moved).sum() / divisor)
    torch.testing.assert_close(found.per_depth, torch.stack(per_depth).detach(), **TIGHT)
    assert_same(found.loss, 0.5 / 3 * sum(per_depth), [*hidden, weight])
    counted = [multi_token_targets(labels, k, mask=mask, **packing) for k in range(3)]
    for k, targets in enumerate(counted):
        moved = torch.zeros(2, 7)
        moved[:, : -k - 1] = everywhere[:, k + 1 :]
        assert targets.equal(torch.where(moved == 0, -100, reference.multi_token_targets(labels, k, **packing)))


def test_mask_of_a_packed_stream():
    """A packed row [1, T, H] with labels [T], and NaN in the mask of a label that is ignored already."""
    hidden, weight, labels = inputs()
    stream, flat = [h[:1] for h in hidden], labels[0].clone()
    flat[2] = -100
    mask = torch.tensor([1, 0.5, 1, 0, 1, 1, 1], dtype=torch.float64)
    expected = multi_token_prediction(stream, weight, flat[None], mask=mask[None])
    mask[2] = float("nan")
    torch.testing.assert_close(multi_token_prediction(stream, weight, flat, mask=mask), expected, **TIGHT)
    assert expected.isfinite()


def test_targets_under_context_parallelism():
    """Context parallelism: two halves of a sequence add up to the whole."""
    hidden, weight, labels = inputs()
    targets = [multi_token_targets(labels, k) for k in range(3)]
    whole = multi_token_prediction(hidden, weight, labels, num_label_tokens=14)
    halves = []
    for part in (slice(0, 4), slice(4, 7)):
        states, own = [h[:, part] for h in hidden], [t[:, part] for t in targets]
        halves.append(multi_token_prediction(states, weight, labels[:, part], targets=own, num_label_tokens=14))
    torch.testing.assert_close(sum(halves), whole, **TIGHT)


def test_no_targets_is_zero_and_attached():
    """Sequences of one token: a context-parallel rank without targets made NaN."""
    hidden, weight, labels = inputs()
    loss = multi_token_prediction(hidden, weight, labels, seq_idx=torch.arange(7))
    assert loss == 0
    assert all(g.abs().max() == 0 for g in torch.autograd.grad(loss, [*hidden, weight]))


def test_compiled():
    hidden, weight, labels = inputs()
    cu_seqlens = torch.tensor([0, 3, 6])

    def loss(hidden, weight, labels, cu_seqlens):
        return multi_token_prediction(hidden, weight, labels, cu_seqlens=cu_seqlens, chunking=Chunking(chunk_size=8))

    calls = [(hidden, weight, labels, cu_seqlens), (hidden, weight, labels, torch.tensor([0, 1, 7]))]
    assert_matches(torch.compile(loss, fullgraph=True), loss, calls[0], wanted=[*hidden, weight])
    assert count_graphs(loss, calls) == 1


HIDDEN, WEIGHT, LABELS = [torch.zeros(2, 3, 4)], torch.zeros(5, 4), torch.zeros(2, 3, dtype=torch.int64)
BAD = [
    ({"hidden": HIDDEN[0]}, ValueError, "hidden: expected a sequence of each depth's hidden states"),
    ({"hidden": []}, ValueError, "hidden: expected a sequence of each depth's hidden states"),
    (
        {"hidden": [torch.zeros(2, 2, 4)]},
        ValueError,
        "hidden[0]: expected the labels' [2, 3] tokens and",
    ),
    ({"weight": torch.zeros(5, 3)}, ValueError, "hidden[0]: expected [..., H] with H = 3"),
    ({"weight": WEIGHT.double()}, TypeError, "weight: expected the dtype of hidden[0]"),
    ({"hidden": [HIDDEN[0], 3]}, TypeError, "hidden[1]: expected a Tensor, got int"),
    ({"labels": LABELS.int()}, TypeError, "labels: expected int64, got torch.int32"),
    ({"scaling_factor": -1.0}, ValueError, "scaling_factor: expected a number >= 0, got -1.0"),
    ({"ignore_index": 0.5}, TypeError, "ignore_index: expected an int, got float"),
    (
        {"seq_idx": torch.zeros(2, 4).long()},
        ValueError,
        "seq_idx: expected the labels' shape [2, 3] or [3]",
    ),
    ({"seq_idx": torch.zeros(2, 3)}, TypeError, "seq_idx: expected an integer dtype, got torch.float32"),
    ({"cu_seqlens": torch.zeros(1).long()}, ValueError, "cu_seqlens: expected [sequences + 1], 2 at least, got [1]"),
    ({"targets": [LABELS, LABELS]}, ValueError, "targets: expected one for each of 1 depths, got 2"),
    ({"targets": [LABELS], "seq_idx": LABELS}, ValueError, "targets: expected None beside seq_idx or cu_seqlens"),
    ({"targets": [LABELS], "mask": LABELS}, ValueError, "targets: expected None beside mask, for theirs are ignored"),
    ({"mask": torch.ones(2)}, ValueError, "mask: expected to broadcast to the labels' [2, 3], got [2]"),
    ({"mask": True}, TypeError, "mask: expected a Tensor, got bool"),
    ({"num_label_tokens": -1}, ValueError, "num_label_tokens: expected >= 0, got -1"),
    ({"softcap": 0.0}, ValueError, "softcap: expected a number > 0 or None, got 0.0"),
    ({"logit_scale": 0.0}, ValueError, "logit_scale: expected a number > 0, got 0.0"),
    ({"temperature": 0.0}, ValueError, "temperature: expected a number > 0, got 0.0"),
    ({"bias": torch.zeros(4)}, ValueError, "bias: expected [V] = [5], got [4]"),
    ({"token_weights": torch.ones(2)}, ValueError, "token_weights: expected to broadcast to the labels' [2, 3]"),
    ({"targets": [LABELS.int()]}, TypeError, "targets[0]: expected int64, got torch.int32"),
    ({"targets": [LABELS], "token_weights": LABELS}, ValueError, "targets: expected None beside token_weights"),
    ({"chunking": None}, TypeError, "chunking: expected a Chunking, got NoneType"),
]


@pytest.mark.parametrize("function", [multi_token_prediction, multi_token_losses], ids=lambda f: f.__name__)
@pytest.mark.parametrize(("changed", "error", "text"), BAD, ids=[case[2][:30] for case in BAD])
def test_invalid_arguments(function, changed, error, text):
    with no_operators(), pytest.raises(error, match="^" + re.escape(text)):
        function(**{"hidden": HIDDEN, "weight": WEIGHT, "labels": LABELS, **changed})


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (partial(multi_token_targets, LABELS, -1), ValueError, "depth: expected an int >= 0, got -1"),
        (partial(multi_token_targets, LABELS, 0.0), TypeError, "depth: expected an int >= 0, got float"),
        (partial(multi_token_targets, LABELS[None], 0), ValueError, "labels: expected [B, S] or [S], got [1, 2, 3]"),
    ],
)
def test_invalid_arguments_of_targets(call, error, text):
    with pytest.raises(error, match="^" + re.escape(text)):
        call()
