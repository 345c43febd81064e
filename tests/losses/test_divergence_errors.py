"""Contract: what two distributions are refused for, in words that begin with the argument's name."""

import inspect
import re
from contextlib import nullcontext

import pytest
import torch
from operators import no_operators
from torch import float16, float64, int32, int64

import compiled_loss
from compiled_loss import Chunking

N, H, V = 3, 4, 5


def zeros(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


LABELS = zeros(N, dtype=int64)
HEADS = {"student_hidden": zeros(N, H), "student_weight": zeros(V, H)}
HEADS |= {"teacher_hidden": zeros(N, 2), "teacher_weight": zeros(V, 2), "labels": LABELS}
VALID = {
    "distillation": {"student_logits": zeros(N, V), "teacher_logits": zeros(N, V), "labels": LABELS},
    "linear_distillation": HEADS,
    "masked_soft_cross_entropy": {
        "logits": zeros(2, N, V),
        "target_probs": zeros(2, N, V),
        "position_mask": zeros(2, N, 1),
    },
    "linear_soft_cross_entropy": {
        "hidden": zeros(N, H),
        "weight": zeros(V, H),
        "position_mask": zeros(N, 1),
        "teacher_hidden": zeros(N, 2),
        "teacher_weight": zeros(2 * V, 2),
        "draft_to_target": torch.arange(V),
    },
}
PROBS = {"teacher_hidden": None, "teacher_weight": None, "draft_to_target": None}
DTYPES = "expected float32, bfloat16, float16 or float64, got"

CASES = {
    "distillation": [
        ({"compile": "always"}, ValueError, "compile: expected True, False or 'auto', got 'always'"),
        ({"class_dim": "classes"}, TypeError, "class_dim: expected an int, got str"),
        ({"class_dim": 2}, ValueError, "class_dim: expected from -2 to 1, got 2"),
        ({"vocab_shard": 3}, TypeError, "vocab_shard: expected a VocabShard, got int"),
        ({"student_logits": None}, TypeError, "student_logits: expected a Tensor, got NoneType"),
        ({"student_logits": zeros(N, 0)}, ValueError, "student_logits: expected [..., V] with V >= 1, got [3, 0]"),
        (
            {"teacher_logits": zeros(N, V + 1)},
            ValueError,
            "teacher_logits: expected the shape of student_logits, [3, 5], got [3, 6]",
        ),
        ({"teacher_logits": zeros(N, V, dtype=int32)}, TypeError, f"teacher_logits: {DTYPES} torch.int32"),
        (
            {"teacher_logits": zeros(N, V, device="meta")},
            ValueError,
            "teacher_logits: expected on cpu like the first argument, got meta",
        ),
        (
            {"labels": zeros(N + 1, dtype=int64)},
            ValueError,
            "labels: expected the shape of student_logits without its last dimension, [3], got [4]",
        ),
        (
            {"labels": LABELS + V, "hard_label_weight": 0.5},
            ValueError,
            "labels: expected 0 <= label < V = 5, or ignore_index = -100, got 5",
        ),
        ({"teacher_topk": ()}, ValueError, "teacher_logits: expected None beside teacher_topk, got a Tensor"),
        ({"fp32_upcast": 1}, TypeError, "fp32_upcast: expected True or False, got int"),
        ({"chunk_size": -1}, ValueError, "chunk_size: expected an int >= 0, got -1"),
        ({"chunk_size": 0.5}, TypeError, "chunk_size: expected an int >= 0, got float"),
    ],
    "linear_distillation": [
        ({"vocab_shard": 3}, TypeError, "vocab_shard: expected a VocabShard, got int"),
        ({"teacher_topk": ()}, ValueError, "teacher_hidden: expected None beside teacher_topk, got a Tensor"),
        ({"student_hidden": zeros(N, H + 1)}, ValueError, "student_hidden: expected [..., H] with H = 4, the width of"),
        ({"student_weight": zeros(H)}, ValueError, "student_weight: expected [V, H] with V >= 1 and H >= 1, got [4]"),
        (
            {"teacher_hidden": zeros(N + 1, 2)},
            ValueError,
            "teacher_hidden: expected the student's tokens, [3] and a width, got [4, 2]",
        ),
        (
            {"teacher_hidden": zeros(N, 3)},
            ValueError,
            "teacher_hidden: expected [..., H] with H = 2, the width",
        ),
        (
            {"teacher_weight": zeros(V + 1, 2)},
            ValueError,
            "teacher_weight: expected the student's V = 5 rows, got 6",
        ),
        (
            {"teacher_weight": zeros(V, 2, dtype=float16)},
            TypeError,
            "teacher_weight: expected the dtype of teacher_hidden",
        ),
        ({"labels": LABELS.int()}, TypeError, "labels: expected int64, got torch.int32: use labels.long()"),
        ({"chunking": 512}, TypeError, "chunking: expected a Chunking, got int"),
        ({"chunking": Chunking(strategy="vocab")}, ValueError, "strategy: expected 'tokens' or 'auto', got 'vocab'"),
        (
            {"chunking": Chunking(memory_budget=8)},
            ValueError,
            "memory_budget: expected at least 40 bytes, one token of logits, got 8",
        ),
        (
            {"chunking": Chunking(accumulate_dtype=float16)},
            ValueError,
            "accumulate_dtype: expected torch.float32 like the inputs or wider, got torch.float16",
        ),
    ],
    "masked_soft_cross_entropy": [
        ({"compile": "always"}, ValueError, "compile: expected True, False or 'auto', got 'always'"),
        ({"vocab_shard": 3}, TypeError, "vocab_shard: expected a VocabShard, got int"),
        ({"logits": [1.0]}, TypeError, "logits: expected a Tensor, got list"),
        (
            {"target_probs": zeros(2, N, V - 1)},
            ValueError,
            "target_probs: expected the shape of logits, [2, 3, 5], got [2, 3, 4]",
        ),
        (
            {"position_mask": zeros(2, 1)},
            ValueError,
            "position_mask: expected the shape of logits with 1 for its last dimension or without it, "
            "[2, 3, 1] or [2, 3], got [2, 1]",
        ),
        ({"position_mask": zeros(N, 2)}, ValueError, "position_mask: expected the shape of logits with 1"),
        ({"position_mask": None}, TypeError, "position_mask: expected a Tensor, got NoneType"),
        (
            {"position_mask": zeros(2, N, dtype=torch.complex64)},
            TypeError,
            "position_mask: expected bool, integer or floating, got torch.complex64",
        ),
    ],
    "linear_soft_cross_entropy": [
        ({"vocab_shard": 3}, TypeError, "vocab_shard: expected a VocabShard, got int"),
        ({"hidden": zeros(N, H, dtype=int32)}, TypeError, f"hidden: {DTYPES} torch.int32"),
        (
            {"weight": zeros(V, H, device="meta")},
            ValueError,
            "weight: expected on cpu like the first argument, got meta",
        ),
        ({"position_mask": zeros(1, N)}, ValueError, "position_mask: expected the shape of hidden with 1"),
        (
            {"target_probs": zeros(N, V)},
            ValueError,
            "target_probs: expected it, or teacher_hidden and teacher_weight, got target_probs, teacher_hidden",
        ),
        (PROBS, ValueError, "target_probs: expected it, or teacher_hidden and teacher_weight, got none of them"),
        (
            {"teacher_hidden": None},
            ValueError,
            "target_probs: expected it, or teacher_hidden and teacher_weight, got teacher_weight",
        ),
        (
            {**PROBS, "target_probs": zeros(N, V), "draft_to_target": torch.arange(V)},
            ValueError,
            "draft_to_target: expected None beside target_probs",
        ),
        (
            {**PROBS, "target_probs": zeros(N, V + 1)},
            ValueError,
            "target_probs: expected [..., V] = [3, 5], got [3, 6]",
        ),
        (
            {**PROBS, "target_probs": zeros(N, V).requires_grad_()},
            ValueError,
            "target_probs: expected a tensor without gradient, got requires_grad=True: use target_probs.detach()",
        ),
        ({"draft_to_target": None}, ValueError, "teacher_weight: expected the student's V = 5 rows, got 10"),
        ({"draft_to_target": torch.arange(V + 1)}, ValueError, "draft_to_target: expected [V] = [5], got [6]"),
        ({"draft_to_target": zeros(V)}, TypeError, "draft_to_target: expected int64, got torch.float32: use"),
        (
            {"num_label_tokens": -1, "reduction": "sum"},
            ValueError,
            "num_label_tokens: expected >= 0, got -1",
        ),
        ({"chunking": 512}, TypeError, "chunking: expected a Chunking, got int"),
        ({"chunking": Chunking(strategy="vocab")}, ValueError, "strategy: expected 'tokens' or 'auto', got 'vocab'"),
        ({"weight": torch.nn.Linear(H, V)}, TypeError, "weight: expected a Tensor, got Linear: use linear.weight and"),
        (
            {"teacher_weight": torch.nn.Linear(2, 2 * V)},
            TypeError,
            "teacher_weight: expected a Tensor, got Linear: use linear.weight and teacher_bias=linear.bias",
        ),
        ({"teacher_bias": zeros(V)}, ValueError, "teacher_bias: expected [V] = [10], got [5]"),
        (
            {**PROBS, "target_probs": zeros(N, V), "teacher_bias": zeros(V)},
            ValueError,
            "teacher_bias: expected None beside target_probs, got a Tensor",
        ),
        *[
            (
                {**PROBS, "target_probs": zeros(N, V), name: 3.0},
                ValueError,
                f"{name}: expected None beside target_probs, got a float",
            )
            for name in ("teacher_softcap", "teacher_logit_scale")
        ],
    ],
}
for name in ("linear_distillation", "linear_soft_cross_entropy"):
    CASES[name] += [
        ({"bias": zeros(V + 1)}, ValueError, "bias: expected [V] = [5], got [6]"),
        ({"bias": zeros(V, dtype=int32)}, TypeError, f"bias: {DTYPES} torch.int32"),
        ({"bias": zeros(V, device="meta")}, ValueError, "bias: expected on cpu like the first argument, got meta"),
        ({"bias": 0.0}, TypeError, "bias: expected a Tensor, got float"),
        ({"teacher_bias": zeros(3)}, ValueError, "teacher_bias: expected [V] = ["),
        ({"teacher_bias": [0.0]}, TypeError, "teacher_bias: expected a Tensor, got list"),
    ]
for name in ("distillation", "linear_distillation"):
    NONE = {key: None for key in VALID[name] if key.startswith("teacher")}
    TOP = {**NONE, "teacher_topk": (zeros(N, 2) - 2, zeros(N, 2, dtype=int64))}
    PROBABILITIES = {**NONE, "teacher_probabilities": zeros(N, V)}
    CASES[name] += [
        ({**given, other: 3.0}, ValueError, f"{other}: expected None beside {list(given)[-1]}, got a float")
        for other in ("teacher_softcap", "teacher_logit_scale")
        for given in (TOP, PROBABILITIES)
    ]
    CASES[name] += [
        (
            NONE,
            ValueError,
            f"{next(iter(NONE))}: expected a Tensor, or teacher_topk or teacher_probabilities, got none",
        ),
        (TOP | PROBABILITIES, ValueError, "teacher_probabilities: expected None beside teacher_topk, got a Tensor"),
        (
            {"teacher_probabilities": zeros(N, V)},
            ValueError,
            f"{next(iter(NONE))}: expected None beside teacher_probabilities, got a Tensor",
        ),
        (
            {**PROBABILITIES, "teacher_probabilities": zeros(N, V + 1)},
            ValueError,
            "teacher_probabilities: expected the shape of ",
        ),
        (
            {**PROBABILITIES, "teacher_probabilities": zeros(N, V, dtype=int64)},
            TypeError,
            f"teacher_probabilities: {DTYPES} torch.int64",
        ),
        (
            {**PROBABILITIES, "teacher_probabilities": [1.0]},
            TypeError,
            "teacher_probabilities: expected a Tensor, got list",
        ),
    ]
CASES["linear_distillation"] += [
    ({**TOP, "teacher_bias": zeros(V)}, ValueError, "teacher_bias: expected None beside teacher_topk, got a Tensor"),
    ({"student_weight": torch.nn.Linear(H, V)}, TypeError, "student_weight: expected a Tensor, got Linear: use linear"),
]
NAMES = "'forward_kl', 'reverse_kl', 'jsd', 'total_variation', 'acceptance', 'lk'"
EVERYWHERE = [
    ({"divergence": "kl"}, ValueError, f"divergence: expected one of {NAMES}, got 'kl'"),
    ({"divergence": None}, ValueError, f"divergence: expected one of {NAMES}, got None"),
    ({"divergence": {}}, ValueError, f"divergence: expected one of {NAMES}, or their weights by name, got none"),
    ({"divergence": {"jsd": 1, "kl": 2}}, ValueError, f"divergence: expected one of {NAMES}, got 'kl'"),
    ({"divergence": {"jsd": -1}}, ValueError, "divergence['jsd']: expected a number >= 0, got -1"),
    ({"divergence": {"jsd": "half"}}, TypeError, "divergence['jsd']: expected a number, got str"),
    ({"lk_decay": -0.5}, ValueError, "lk_decay: expected a number >= 0, got -0.5"),
    ({"lk_decay": None}, TypeError, "lk_decay: expected a number, got NoneType"),
    ({"temperature_squared": 1}, TypeError, "temperature_squared: expected True or False, got int"),
    ({"jsd_weight": 1.0}, ValueError, "jsd_weight: expected a number between 0 and 1, got 1.0"),
    ({"jsd_weight": "half"}, TypeError, "jsd_weight: expected a number, got str"),
    ({"temperature": 0.0}, ValueError, "temperature: expected a number > 0, got 0.0"),
    ({"softcap": 0.0}, ValueError, "softcap: expected a number > 0 or None, got 0.0"),
    ({"logit_scale": 0.0}, ValueError, "logit_scale: expected a number > 0, got 0.0"),
    ({"logit_scale": None}, TypeError, "logit_scale: expected a number, got NoneType"),
    ({"teacher_softcap": -1.0}, ValueError, "teacher_softcap: expected a number > 0 or None, got -1.0"),
    ({"teacher_logit_scale": 0.0}, ValueError, "teacher_logit_scale: expected a number > 0 or None, got 0.0"),
    ({"bias": zeros(V + 1)}, ValueError, "bias: expected [V] = [5], got [6]"),
    ({"teacher_bias": zeros(V - 1)}, ValueError, "teacher_bias: expected"),
    ({"mask": zeros(N + 1)}, ValueError, "mask: expected to broadcast to the labels' [3], got [4]"),
    ({"token_weights": zeros(N + 1)}, ValueError, "token_weights: expected to broadcast to the labels'"),
    ({"shift": -1}, ValueError, "shift: expected an int >= 0, got -1"),
    ({"hard_label_weight": -0.1}, ValueError, "hard_label_weight: expected a number from 0 to 1, got -0.1"),
    ({"softcap": 0.0}, ValueError, "softcap: expected a number > 0 or None, got 0.0"),
    ({"softcap": float("inf")}, ValueError, "softcap: expected a number > 0 or None, got inf"),
    ({"softcap": "30"}, TypeError, "softcap: expected a number or None, got str"),
    ({"logit_scale": -1.0}, ValueError, "logit_scale: expected a number > 0, got -1.0"),
    ({"logit_scale": None}, TypeError, "logit_scale: expected a number, got NoneType"),
    ({"teacher_softcap": -2}, ValueError, "teacher_softcap: expected a number > 0 or None, got -2"),
    ({"teacher_logit_scale": 0}, ValueError, "teacher_logit_scale: expected a number > 0 or None, got 0"),
    ({"teacher_logit_scale": True}, TypeError, "teacher_logit_scale: expected a number or None, got bool"),
    ({"token_weights": zeros(7)}, ValueError, "token_weights: expected to broadcast to the labels' ["),
    ({"token_weights": [1.0]}, TypeError, "token_weights: expected a Tensor, got list"),
    ({"mask": zeros(7)}, ValueError, "mask: expected to broadcast to the labels' [3], got [7]"),
    ({"mask": zeros(N, dtype=torch.complex64)}, TypeError, "mask: expected bool, integer or floating, got torch.comp"),
    ({"shift": -1}, ValueError, "shift: expected an int >= 0, got -1"),
    ({"shift": 0.5}, TypeError, "shift: expected an int, got float"),
    ({"ignore_index": 1.5}, TypeError, "ignore_index: expected an int, got float"),
    ({"reduction": "average"}, ValueError, "reduction: expected one of 'none', 'sum', 'mean', got 'average'"),
    ({"num_label_tokens": 2.5, "reduction": "sum"}, TypeError, "num_label_tokens: expected an int, a tensor or None"),
    (
        {"num_label_tokens": 2, "reduction": "none"},
        ValueError,
        "num_label_tokens: expected None unless reduction='sum'",
    ),
]
ALL = [(name, *case) for name, cases in CASES.items() for case in cases]
ALL += [
    (name, *case)
    for name in CASES
    for case in EVERYWHERE
    if case[0].keys() <= inspect.signature(getattr(compiled_loss, name)).parameters.keys()
]


@pytest.mark.parametrize(("name", "changed", "error", "text"), ALL, ids=[f"{c[0]}-{c[3][:40]}" for c in ALL])
def test_invalid_arguments(name, changed, error, text):
    reads = "index < V" in text or "log-probabilities" in text or "0 <= label" in text  # what is in a tensor
    with nullcontext() if reads else no_operators(), pytest.raises(error, match="^" + re.escape(text)):
        getattr(compiled_loss, name)(**{**VALID[name], **changed})


@pytest.mark.parametrize("name", CASES)
def test_every_parameter_has_an_error_case(name):
    function = getattr(compiled_loss, name)
    function(**VALID[name])
    tried = {key for case in ALL if case[0] == name for key in case[1]}
    assert inspect.signature(function).parameters.keys() <= tried


def test_position_mask_does_not_broadcast():
    """soft_ce.py: [B, S] broadcast to [B, S, S]."""
    logits, probs = torch.randn(N, N, V), torch.rand(N, N, V)
    mask = torch.rand(N, N)
    torch.testing.assert_close(
        compiled_loss.masked_soft_cross_entropy(logits, probs, mask),
        compiled_loss.masked_soft_cross_entropy(logits, probs, mask.unsqueeze(-1)),
    )


def test_error_text_compiled():
    compiled = torch.compile(lambda given: compiled_loss.distillation(**given), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="teacher_logits: expected the shape of student_logits"):
        compiled({**VALID["distillation"], "teacher_logits": zeros(N, 2, dtype=float64)})
