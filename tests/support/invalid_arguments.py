"""Invalid arguments of losses of labels: what is passed, the error, and its whole text."""

import inspect
import re

import torch
from torch import float16, float32, int32, int64

import compiled_loss
from compiled_loss import Chunking
from compiled_loss.engine.math.statistics import NAMES
from compiled_loss.functional import policy_terms, preference_terms

N, H, V = 3, 4, 5
FUNCTIONS = {  # of labels alone; two distributions are in test_divergence_errors.py, depths in test_multi_token.py
    name: getattr(compiled_loss, name)
    for name in compiled_loss.__all__
    if inspect.isfunction(getattr(compiled_loss, name))
    and {"mask", "labels"} <= inspect.signature(getattr(compiled_loss, name)).parameters.keys()
    and not re.match("multi_token|calculate|.*distillation", name)
}


def zeros(*shape, dtype=float32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


def arguments(function):
    """Valid tensors for every one of its positional parameters."""
    valid = {"logits": zeros(N, V), "hidden": zeros(N, H), "weight": zeros(V, H), "labels": zeros(N, dtype=int64)}
    valid |= {"old_logprob": zeros(N), "advantages": zeros(N), "token_loss": logprob}
    valid |= {"desirable": zeros(2, dtype=torch.bool), "segment_ids": torch.tensor([0, 0, 1]), "num_pairs": 1}
    valid["kl"] = zeros()
    parameters = inspect.signature(function).parameters
    if not {"desirable", "num_pairs"} & parameters.keys():  # tokens are no answers
        valid = {name: value for name, value in valid.items() if name not in ("segment_ids", "kl")}
    return {name: value for name, value in valid.items() if name in parameters}


def logprob(statistics):
    return -statistics.logprob


def label(value):
    return torch.tensor([1, value, 2])


STATISTICS = ", ".join(map(repr, NAMES))
FLOATING = "float32, bfloat16, float16 or float64"
KINDS, KLS, PAIR_KINDS = (
    ", ".join(map(repr, names)) for names in (policy_terms.KINDS, policy_terms.KLS, preference_terms.KINDS)
)
# What is passed instead, the error, the whole text. Each is tried on every function that has these parameters.
CASES = [
    ({"vocab_shard": 3}, TypeError, "vocab_shard: expected a VocabShard, got int"),
    ({"wanted": "entropy"}, TypeError, f"wanted: expected some of {STATISTICS} in a tuple, got 'entropy'"),
    ({"wanted": ("top",)}, ValueError, f"wanted: expected some of {STATISTICS}, got 'top'"),
    (
        {"token_loss": "dpo"},
        TypeError,
        "token_loss: expected a function (statistics [C], *inputs [C, ...]) -> [C] of torch operations on its "
        "arguments, got str",
    ),
    ({"old_logprob": None}, TypeError, "old_logprob: expected a Tensor, got NoneType"),
    ({"advantages": zeros(2)}, ValueError, "advantages: expected [3], a value for each token, got [2]"),
    ({"kind": "ppo", "importance": "token"}, ValueError, f"kind: expected one of {KINDS}, got 'ppo'"),
    ({"kind": "dpo", "margin": 0.0}, ValueError, f"kind: expected one of {PAIR_KINDS}, got 'dpo'"),
    (
        {"kind": "bco", "desirable_weight": 1.0},
        ValueError,
        "kind: expected one of 'kto', 'apo_zero_unpaired', got 'bco'",
    ),
    ({"beta": -0.1}, ValueError, "beta: expected a number > 0, got -0.1"),
    ({"margin": -0.5}, ValueError, "margin: expected a number >= 0, got -0.5"),
    ({"pair_margins": zeros(2)}, ValueError, "pair_margins: expected [1], one for each pair, got [2]"),
    ({"pair_weights": 1.0}, TypeError, "pair_weights: expected a Tensor, got float"),
    ({"length_normalised": None}, TypeError, "length_normalised: expected True or False, got NoneType"),
    (
        {"f_divergence": "kl"},
        ValueError,
        "f_divergence: expected one of 'reverse_kl', 'forward_kl', 'js', 'alpha', got 'kl'",
    ),
    ({"alpha": float("inf")}, ValueError, "alpha: expected a finite number, got inf"),
    ({"sft_coefficient": -1}, ValueError, "sft_coefficient: expected a number >= 0, got -1"),
    ({"num_chosen_tokens": -1}, ValueError, "num_chosen_tokens: expected a number >= 0, got -1"),
    ({"num_pairs": 1.5}, TypeError, "num_pairs: expected an int, got float"),
    ({"num_pairs": -1}, ValueError, "num_pairs: expected an int >= 0, got -1"),
    (
        {"reference_hidden": zeros(N, H + 2)},
        ValueError,
        "reference_hidden: expected [..., H] with H = 4, the width of reference_weight, got [3, 6]",
    ),
    (
        {"reference_weight": zeros(V, H)},
        ValueError,
        "reference_hidden: expected a Tensor where reference_weight is given, got None",
    ),
    (
        {"reference_bias": zeros(V)},
        ValueError,
        "reference_weight: expected a Tensor where reference_bias is given, got None",
    ),
    ({"desirable": zeros(2)}, TypeError, "desirable: expected bool, got torch.float32"),
    ({"desirable_weight": -1}, ValueError, "desirable_weight: expected a number >= 0, got -1"),
    ({"undesirable_weight": None}, TypeError, "undesirable_weight: expected a number, got NoneType"),
    ({"sequence_weights": zeros(3)}, ValueError, "sequence_weights: expected [2], one for each answer, got [3]"),
    (
        {"kl": zeros(0), "desirable_weight": 1.0},
        ValueError,
        "kl: expected [K], a log-ratio for each mismatched answer, or their mean [], got [0]",
    ),
    ({"kl": "k4", "importance": "token"}, ValueError, f"kl: expected one of {KLS}, got 'k4'"),
    ({"importance": "turn"}, ValueError, "importance: expected one of 'token', 'sequence', got 'turn'"),
    (
        {"kind": "gmpo", "importance": "token"},
        ValueError,
        "importance: expected 'sequence' beside kind='gmpo', got 'token'",
    ),
    ({"clip_low": -0.1}, ValueError, "clip_low: expected a number >= 0, got -0.1"),
    ({"clip_high": "0.2"}, TypeError, "clip_high: expected a number, got str"),
    ({"dual_clip": 1}, ValueError, "dual_clip: expected a number > 1 or None, got 1"),
    ({"temperature_positive": 0}, ValueError, "temperature_positive: expected a number > 0, got 0"),
    ({"temperature_negative": -1.0}, ValueError, "temperature_negative: expected a number > 0, got -1.0"),
    (
        {"reference_logprob": zeros(1), "importance": "token"},
        ValueError,
        "reference_logprob: expected [3], a value for each token, got [1]",
    ),
    (
        {"reference_logprob": zeros(1), "reference_hidden": None},
        ValueError,
        "reference_logprob: expected [3], a value for each token, got [1]",
    ),
    ({"kl_coefficient": -1}, ValueError, "kl_coefficient: expected a number >= 0, got -1"),
    ({"correction": zeros(4)}, ValueError, "correction: expected [3], a value for each token, got [4]"),
    ({"entropy_coefficient": None}, TypeError, "entropy_coefficient: expected a number, got NoneType"),
    (
        {"entropy_weights": zeros(N)},
        ValueError,
        "token_weights: expected a Tensor where entropy_weights are given, got None",
    ),
    ({"segment_ids": zeros(N)}, TypeError, "segment_ids: expected int64, got torch.float32"),
    ({"logits": [1.0]}, TypeError, "logits: expected a Tensor, got list"),
    (
        {"logits": zeros(N, V, dtype=int64)},
        TypeError,
        "logits: expected float32, bfloat16, float16 or float64, got torch.int64",
    ),
    ({"logits": zeros()}, ValueError, "logits: expected [..., V] with V >= 1, got []"),
    ({"logits": zeros(N, 0)}, ValueError, "logits: expected [..., V] with V >= 1, got [3, 0]"),
    ({"hidden": None}, TypeError, "hidden: expected a Tensor, got NoneType"),
    (
        {"hidden": zeros(N, H, dtype=int32)},
        TypeError,
        "hidden: expected float32, bfloat16, float16 or float64, got torch.int32",
    ),
    (
        {"hidden": zeros(N, H + 2)},
        ValueError,
        "hidden: expected [..., H] with H = 4, the width of weight, got [3, 6]",
    ),
    (
        {"weight": zeros(H, V)},
        ValueError,
        "hidden: expected [..., H] with H = 5, the width of weight, got [3, 4]: use weight.t() where it is [H, V]",
    ),
    (
        {"weight": torch.nn.Linear(H, V)},
        TypeError,
        "weight: expected a Tensor, got Linear: use linear.weight and bias=linear.bias",
    ),
    (
        {"weight": torch.nn.Linear(H, V, bias=False)},
        TypeError,
        "weight: expected a Tensor, got Linear: use linear.weight",
    ),
    (
        {"weight": torch.nn.Linear(H, V), "bias": zeros(V)},
        TypeError,
        "weight: expected a Tensor, got Linear: use linear.weight",
    ),
    ({"weight": torch.nn.ReLU()}, TypeError, "weight: expected a Tensor, got ReLU"),
    (
        {"hidden": zeros(V, H), "weight": zeros(N, H)},
        ValueError,
        "labels: expected the shape of hidden without its last dimension, [5], got [3]: hidden comes first, its weight "
        "second",
    ),
    (
        {"hidden": zeros(V, H), "weight": zeros(2, N, H)},
        ValueError,
        "weight: expected [V, H] with V >= 1 and H >= 1, got [2, 3, 4]: hidden comes first, weight second",
    ),
    ({"compile": "always"}, ValueError, "compile: expected True, False or 'auto', got 'always'"),
    ({"class_dim": "classes"}, TypeError, "class_dim: expected an int, got str"),
    ({"class_dim": 2}, ValueError, "class_dim: expected from -2 to 1, got 2"),
    ({"class_dim": -3}, ValueError, "class_dim: expected from -2 to 1, got -3"),
    (
        {"class_dim": 0},
        ValueError,
        "labels: expected the shape of logits without dimension 0, [5], got [3]",
    ),
    (
        {"logits": zeros(2, V, N), "labels": zeros(2, N, dtype=int64)},
        ValueError,
        "labels: expected the shape of logits without its last dimension, [2, 5], got [2, 3]: use class_dim=1",
    ),
    (
        {"labels": zeros(N, V, dtype=int64), "logits": zeros(N, V)},
        ValueError,
        "labels: expected the shape of logits without its last dimension, [3], got [3, 5]: use labels.to(logits.dtype) "
        "where they are probabilities",
    ),
    (
        {"hidden": zeros(N + 1, H), "logits": zeros(N + 1, V)},
        ValueError,
        "without its last dimension, [4], got [3]: give unshifted labels with shift=1, or leave out the last token of ",
    ),
    ({"hidden": zeros()}, ValueError, "hidden: expected [..., H] with H = 4, the width of weight, got []"),
    ({"weight": "lm_head"}, TypeError, "weight: expected a Tensor, got str"),
    (
        {"weight": zeros(V, H, dtype=torch.complex64)},
        TypeError,
        "weight: expected float32, bfloat16, float16 or float64, got torch.complex64",
    ),
    ({"weight": zeros(H)}, ValueError, "weight: expected [V, H] with V >= 1 and H >= 1, got [4]"),
    ({"weight": zeros(0, H)}, ValueError, "weight: expected [V, H] with V >= 1 and H >= 1, got [0, 4]"),
    (
        {"weight": zeros(V, H, device="meta")},
        ValueError,
        "weight: expected on cpu like the first argument, got meta",
    ),
    (
        {"weight": zeros(V, H, dtype=float16)},
        TypeError,
        "weight: expected the dtype of hidden, torch.float32, got torch.float16: "
        "cast one of them, or call under torch.autocast",
    ),
    ({"labels": 0}, TypeError, "labels: expected a Tensor, got int"),
    (
        {"labels": zeros(N, dtype=int32)},
        TypeError,
        "labels: expected int64, got torch.int32: use labels.long()",
    ),
    (
        {"labels": zeros(N, device="meta", dtype=int64)},
        ValueError,
        "labels: expected on cpu like the first argument, got meta",
    ),
    ({"labels": label(V)}, ValueError, "labels: expected 0 <= label < V = 5, or ignore_index = -100, got 5"),
    ({"labels": label(-1)}, ValueError, "labels: expected 0 <= label < V = 5, or ignore_index = -100, got -1"),
    (
        {"labels": label(-100), "ignore_index": 0},
        ValueError,
        "labels: expected 0 <= label < V = 5, or ignore_index = 0, got -100",
    ),
    ({"bias": 1.0}, TypeError, "bias: expected a Tensor, got float"),
    (
        {"bias": zeros(V, dtype=int64)},
        TypeError,
        "bias: expected float32, bfloat16, float16 or float64, got torch.int64",
    ),
    ({"bias": zeros(V, 1)}, ValueError, "bias: expected [V] = [5], got [5, 1]"),
    ({"bias": zeros(V, device="meta")}, ValueError, "bias: expected on cpu like the first argument, got meta"),
    ({"mask": [True]}, TypeError, "mask: expected a Tensor, got list"),
    ({"mask": zeros(2)}, ValueError, "mask: expected to broadcast to the labels' [3], got [2]"),
    ({"mask": zeros(1, N)}, ValueError, "mask: expected to broadcast to the labels' [3], got [1, 3]"),
    ({"mask": zeros(N, device="meta")}, ValueError, "mask: expected on cpu like the first argument, got meta"),
    ({"token_weights": 0.5}, TypeError, "token_weights: expected a Tensor, got float"),
    (
        {"token_weights": zeros(N, dtype=torch.complex64)},
        TypeError,
        "token_weights: expected bool, integer or floating, got torch.complex64",
    ),
    ({"token_weights": zeros(4)}, ValueError, "token_weights: expected to broadcast to the labels' [3], got [4]"),
    (
        {"token_weights": zeros(N, device="meta")},
        ValueError,
        "token_weights: expected on cpu like the first argument, got meta",
    ),
    ({"class_weights": [1.0] * V}, TypeError, "class_weights: expected a Tensor, got list"),
    ({"class_weights": zeros(V - 1)}, ValueError, "class_weights: expected [V] = [5], got [4]"),
    (
        {"class_weights": zeros(V, dtype=int64)},
        TypeError,
        "class_weights: expected float32, bfloat16, float16 or float64, got torch.int64",
    ),
    (
        {"class_weights": zeros(V, device="meta")},
        ValueError,
        "class_weights: expected on cpu like the first argument, got meta",
    ),
    (
        {"class_weights": zeros(V).requires_grad_()},
        ValueError,
        "class_weights: expected a tensor without gradient, got requires_grad=True: use class_weights.detach()",
    ),
    ({"ignore_index": None}, TypeError, "ignore_index: expected an int, got NoneType"),
    ({"ignore_index": 1.5}, TypeError, "ignore_index: expected an int, got float"),
    ({"shift": -1}, ValueError, "shift: expected an int >= 0, got -1"),
    ({"shift": 1.5}, TypeError, "shift: expected an int, got float"),
    ({"shift": True}, TypeError, "shift: expected an int, got bool"),
    ({"softcap": 0.0}, ValueError, "softcap: expected a number > 0 or None, got 0.0"),
    ({"softcap": -30}, ValueError, "softcap: expected a number > 0 or None, got -30"),
    ({"softcap": float("nan")}, ValueError, "softcap: expected a number > 0 or None, got nan"),
    ({"logit_scale": 0}, ValueError, "logit_scale: expected a number > 0, got 0"),
    ({"logit_scale": -0.5}, ValueError, "logit_scale: expected a number > 0, got -0.5"),
    ({"logit_scale": None}, TypeError, "logit_scale: expected a number, got NoneType"),
    ({"temperature": float("inf")}, ValueError, "temperature: expected a number > 0, got inf"),
    ({"temperature": 0}, ValueError, "temperature: expected a number > 0, got 0"),
    ({"temperature": -1.0}, ValueError, "temperature: expected a number > 0, got -1.0"),
    ({"temperature": float("nan")}, ValueError, "temperature: expected a number > 0, got nan"),
    ({"temperature": zeros(2)}, ValueError, "temperature: expected to broadcast to the labels' [3], got [2]"),
    ({"temperature": zeros(N, dtype=int64)}, TypeError, f"temperature: expected {FLOATING}, got torch.int64"),
    (
        {"temperature": zeros(N).requires_grad_()},
        ValueError,
        "temperature: expected a tensor without gradient, got requires_grad=True: use .detach()",
    ),
    ({"top_k": 0}, ValueError, "top_k: expected from 1 to V = 5, or None, got 0"),
    ({"top_k": 6}, ValueError, "top_k: expected from 1 to V = 5, or None, got 6"),
    ({"top_k": "all"}, TypeError, "top_k: expected an int or None, got str"),
    ({"top_k": 2, "kept_ids": zeros(N, 2, dtype=int64)}, ValueError, "top_k: expected None beside kept_ids, got 2"),
    ({"ids": [1]}, TypeError, "ids: expected a Tensor, got list"),
    ({"ids": zeros(N, 2)}, TypeError, "ids: expected int64, got torch.float32"),
    (
        {"ids": zeros(2, 2, dtype=int64)},
        ValueError,
        "ids: expected [3, K] or [K], classes for each token, got [2, 2]",
    ),
    ({"kept_ids": zeros(N, 2, dtype=int32)}, TypeError, "kept_ids: expected int64, got torch.int32"),
    ({"kept_ids": zeros(4, dtype=int64)}, ValueError, "kept_ids: expected [3, K], classes for each token, got [4]"),
    (
        {"kept_ids": zeros(N, 2, dtype=int64, device="meta")},
        ValueError,
        "kept_ids: expected on cpu like the first argument, got meta",
    ),
    (
        {"kept_ids": zeros(N, 2, dtype=int64), "wanted": ("mean_logit",)},
        ValueError,
        "wanted: expected no 'mean_logit' beside kept_ids, got ('mean_logit',)",
    ),
    ({"label_smoothing": -0.1}, ValueError, "label_smoothing: expected a number from 0 to 1, got -0.1"),
    ({"label_smoothing": 1.1}, ValueError, "label_smoothing: expected a number from 0 to 1, got 1.1"),
    ({"z_loss": -1e-4}, ValueError, "z_loss: expected a number >= 0, got -0.0001"),
    ({"z_loss": float("nan")}, ValueError, "z_loss: expected a number >= 0, got nan"),
    ({"reduction": "average"}, ValueError, "reduction: expected one of 'none', 'sum', 'mean', got 'average'"),
    ({"fp32_upcast": 1}, TypeError, "fp32_upcast: expected True or False, got int"),
    ({"reduction": None}, ValueError, "reduction: expected one of 'none', 'sum', 'mean', got None"),
    (
        {"num_label_tokens": 3, "reduction": "mean"},
        ValueError,
        "num_label_tokens: expected None unless reduction='sum', which it divides, got reduction='mean'",
    ),
    (
        {"num_label_tokens": torch.tensor(3), "reduction": "none"},
        ValueError,
        "num_label_tokens: expected None unless reduction='sum', which it divides, got reduction='none'",
    ),
    ({"num_label_tokens": -1, "reduction": "sum"}, ValueError, "num_label_tokens: expected >= 0, got -1"),
    (
        {"num_label_tokens": torch.ones(2), "reduction": "sum"},
        ValueError,
        "num_label_tokens: expected one element, got [2]",
    ),
    (
        {"num_label_tokens": torch.ones(1, device="meta"), "reduction": "sum"},
        ValueError,
        "num_label_tokens: expected on cpu, got meta",
    ),
    (
        {"num_label_tokens": 3.5, "reduction": "sum"},
        TypeError,
        "num_label_tokens: expected an int, a tensor or None, got float",
    ),
    (
        {"num_label_tokens": True, "reduction": "sum"},
        TypeError,
        "num_label_tokens: expected an int, a tensor or None, got bool",
    ),
    (
        {"chunking": Chunking(strategy="tokens", memory_budget=19)},
        ValueError,
        "memory_budget: expected at least 20 bytes, one token of logits, got 19",
    ),
    (
        {"chunking": Chunking(strategy="vocab", memory_budget=11)},
        ValueError,
        "memory_budget: expected at least 12 bytes, one column of logits, got 11",
    ),
    (
        {"chunking": Chunking(accumulate_dtype=torch.bfloat16)},
        ValueError,
        "accumulate_dtype: expected torch.float32 like the inputs or wider, got torch.bfloat16",
    ),
    (
        {
            "chunking": Chunking(accumulate_dtype=float16),  # as many bits, but not as far a range
            "hidden": zeros(N, H, dtype=torch.bfloat16),
            "weight": zeros(V, H, dtype=torch.bfloat16),
        },
        ValueError,
        "accumulate_dtype: expected torch.bfloat16 like the inputs or wider, got torch.float16",
    ),
    # Which argument the shape was expected of depends on the function.
    (
        {"logits": zeros(N, V), "labels": zeros(4, dtype=int64)},
        ValueError,
        "labels: expected the shape of logits without its last dimension, [3], got [4]",
    ),
    (
        {"hidden": zeros(2, N, H), "labels": zeros(6, dtype=int64)},
        ValueError,
        "labels: expected the shape of hidden without its last dimension, [2, 3], got [6]",
    ),
]
