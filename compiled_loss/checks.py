"""The errors of a loss's arguments: each names the argument, what was expected and what came, before any work."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

OLDEST_TORCH = (2, 11)
_REDUCTIONS = ("none", "sum", "mean")
_DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")
_STRATEGIES = ("auto", "tokens", "vocab")


class UnsupportedTorchError(ImportError, ValueError):
    """The installed torch is older than the oldest this library is tested on."""


def torch_version(version: str) -> None:
    """Raise unless `version` is one this library is tested on, or newer."""
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise UnsupportedTorchError(
            f"compiled_loss: expected torch >= {oldest}, got {version}: pip install 'torch>={oldest}'"
        )


def tensor(name: str, value: object) -> None:
    """Raise unless `value` is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(value).__name__}")


def floating(name: str, value: Tensor) -> None:
    """Raise unless `value` is of a floating dtype that gradients are computed in."""
    if value.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise TypeError(f"{name}: expected float32, bfloat16, float16 or float64, got {value.dtype}")


def labels(value: Tensor, rows: str, shape: torch.Size, device: torch.device) -> None:
    """Raise unless `value` is int64, shaped like the rows of `rows` and on their device."""
    tensor("labels", value)
    if value.dtype != torch.int64:
        raise TypeError(f"labels: expected int64, got {value.dtype}: use labels.long()")
    if value.shape != shape:
        raise ValueError(
            f"labels: expected the shape of {rows} without its last dimension, {sizes(shape)}, got {sizes(value.shape)}"
        )
    same_device("labels", value, device)


def same_device(name: str, value: Tensor, device: torch.device) -> None:
    """Raise unless `value` is on `device`."""
    if value.device != device:
        raise ValueError(f"{name}: expected on {device} like the first argument, got {value.device}")


def logits(value: Tensor, vocab: int, name: str = "logits") -> None:
    """Raise unless `value` is [..., V], or a rank's part of it."""
    floating(name, value)
    if value.dim() < 1 or vocab < 1:
        raise ValueError(f"{name}: expected [..., V] with V >= 1, got {sizes(value.shape)}")


def same_logits(name: str, value: Tensor, other: str, source: Tensor) -> None:
    """Raise unless `value` has a number for each of those of `source`, the argument called `other`."""
    tensor(name, value)
    floating(name, value)
    if value.shape != source.shape:
        raise ValueError(f"{name}: expected the shape of {other}, {sizes(source.shape)}, got {sizes(value.shape)}")
    same_device(name, value, source.device)


def head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    vocab: int,
    names: tuple[str, str] = ("hidden", "weight"),
) -> None:
    """Raise unless hidden @ weight.T + bias exists; `names` are those of the first two, `vocab` V of all ranks."""
    for name, value in zip(names, (hidden, weight), strict=True):
        floating(name, value)
    if weight.dim() != 2 or weight.shape[1] == 0 or vocab == 0:
        raise ValueError(f"{names[1]}: expected [V, H] with V >= 1 and H >= 1, got {sizes(weight.shape)}")
    if hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{names[0]}: expected [..., H] with H = {weight.shape[1]}, the width of {names[1]}, "
            f"got {sizes(hidden.shape)}"
        )
    same_device(names[1], weight, hidden.device)
    if bias is not None:
        vocabulary_vector("bias", bias, weight.shape[0], hidden.device)


def teacher(hidden: Tensor, weight: Tensor, student: Tensor, rows: int | None) -> None:
    """Raise unless a teacher's head fits the hidden states of its student; `rows`, if any, are its weight's."""
    names = ("teacher_hidden", "teacher_weight")
    for name, value in zip(names, (hidden, weight), strict=True):
        tensor(name, value)
    head(hidden, weight, None, weight.shape[0] if rows is None else 1, names)
    if hidden.shape[:-1] != student.shape[:-1]:
        raise ValueError(
            f"teacher_hidden: expected the student's tokens, {sizes(student.shape[:-1])} and a width, "
            f"got {sizes(hidden.shape)}"
        )
    if rows is not None and weight.shape[0] != rows:
        raise ValueError(f"teacher_weight: expected the student's V = {rows} rows, got {weight.shape[0]}")
    same_device("teacher_hidden", hidden, student.device)


def teacher_given(name: str, value: Tensor | None) -> Tensor:
    """The teacher; raise where it is missing, and no cached one came instead."""
    if value is None:
        raise ValueError(f"{name}: expected a Tensor, or teacher_topk, got neither")
    return value


def teacher_topk(value: object, others: dict[str, Tensor | None], source: Tensor, vocab: int) -> None:
    """Raise unless `value` holds the top of a distribution for each row of `source`, and no other teacher is given."""
    for name, other in others.items():
        if other is not None:
            raise ValueError(f"{name}: expected None beside teacher_topk, got a {type(other).__name__}")
    if not isinstance(value, tuple) or len(value) != 2:
        raise TypeError(f"teacher_topk: expected (values, indices) or None, got {type(value).__name__}")
    values, indices = value
    for name, part in (("teacher_topk[0]", values), ("teacher_topk[1]", indices)):
        tensor(name, part)
        if part.shape[:-1] != source.shape[:-1] or part.dim() != source.dim() or not 1 <= part.shape[-1] <= vocab:
            expected = sizes(source.shape[:-1])[:-1] + (", " if source.dim() > 1 else "") + "k]"
            raise ValueError(f"{name}: expected {expected} with k from 1 to V = {vocab}, got {sizes(part.shape)}")
        same_device(name, part, source.device)
    floating("teacher_topk[0]", values)
    if indices.dtype != torch.int64:
        raise TypeError(f"teacher_topk[1]: expected int64, got {indices.dtype}: use indices.long()")
    if indices.shape != values.shape:
        raise ValueError(f"teacher_topk[1]: expected {sizes(values.shape)} like its values, got {sizes(indices.shape)}")


def teacher_topk_values(values: Tensor, indices: Tensor, vocab: int) -> None:
    """Raise unless rows [rows, k] are parts of distributions. Reads the tensors: for eager CPU code alone."""
    outside = indices[(indices < 0) | (indices >= vocab)]
    if outside.numel():
        raise ValueError(f"teacher_topk[1]: expected 0 <= index < V = {vocab}, got {outside[0].item()}")
    if (indices.sort().values.diff() == 0).any():
        raise ValueError("teacher_topk[1]: expected each class of a token once, got one twice")
    total = values.double().exp().sum(-1)
    rounding = torch.finfo(values.dtype).eps * (1 + math.log(values.shape[-1]))  # of logarithms: eps times an entropy
    if (total > 1 + rounding).any():
        raise ValueError(
            f"teacher_topk[0]: expected log-probabilities, got probabilities that sum to {total.max().item():.4g}: "
            "use (teacher_logits / temperature).log_softmax(-1).topk(k)"
        )


def same_dtype(hidden: Tensor, weight: Tensor) -> None:
    """Raise unless one GEMM can take both."""
    if hidden.dtype != weight.dtype:
        raise TypeError(
            f"weight: expected the dtype of hidden, {hidden.dtype}, got {weight.dtype}: "
            "cast one of them, or call under torch.autocast"
        )


def vocabulary_vector(name: str, value: Tensor, vocab: int, device: torch.device) -> None:
    """Raise unless `value` is a floating [V]."""
    tensor(name, value)
    floating(name, value)
    if value.shape != (vocab,):
        raise ValueError(f"{name}: expected [V] = [{vocab}], got {sizes(value.shape)}")
    same_device(name, value, device)


def class_weights(value: Tensor | None, vocab: int, device: torch.device) -> None:
    """Raise unless `value` is None or a constant [V]."""
    if value is None:
        return
    vocabulary_vector("class_weights", value, vocab, device)
    if value.requires_grad:
        raise ValueError(
            "class_weights: expected a tensor without gradient, got requires_grad=True: use class_weights.detach()"
        )


def per_token(name: str, value: Tensor | None, shape: torch.Size, device: torch.device) -> None:
    """Raise unless `value` is None or broadcasts to `shape`, that of the labels."""
    if value is None:
        return
    tensor(name, value)
    if value.dtype.is_complex:
        raise TypeError(f"{name}: expected bool, integer or floating, got {value.dtype}")
    fits = value.dim() <= len(shape) and all(
        mine in (1, theirs) for mine, theirs in zip(reversed(value.shape), reversed(shape), strict=False)
    )
    if not fits:
        raise ValueError(f"{name}: expected to broadcast to the labels' {sizes(shape)}, got {sizes(value.shape)}")
    same_device(name, value, device)


def tokens(labels_: Tensor, mask: Tensor | None, token_weights: Tensor | None, name: str, source: Tensor) -> None:
    """Raise unless the tensors of tokens fit `source` [..., V or H], the argument called `name`."""
    labels(labels_, name, source.shape[:-1], source.device)
    per_token("mask", mask, labels_.shape, source.device)
    per_token("token_weights", token_weights, labels_.shape, source.device)


def number(name: str, value: object, alternative: str = "") -> None:
    """Raise unless `value` is one that arithmetic takes."""
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name}: expected a number{alternative}, got {type(value).__name__}")


def instance(name: str, value: object, kind: type) -> None:
    """Raise unless `value` is one of ours."""
    if not isinstance(value, kind):
        raise TypeError(f"{name}: expected a {kind.__name__}, got {type(value).__name__}")


def transform(softcap: float | None, temperature: float) -> None:
    """Raise unless z is defined."""
    if softcap is not None:
        number("softcap", softcap, " or None")
        if not 0 < softcap < math.inf:  # inf * tanh(z / inf) is NaN
            raise ValueError(f"softcap: expected a number > 0 or None, got {softcap}")
    number("temperature", temperature)
    if not temperature > 0:
        raise ValueError(f"temperature: expected a number > 0, got {temperature}")


def alignment(shift: int, ignore_index: int, dimensions: int) -> None:
    """Raise unless tokens can be told apart and moved."""
    for name, value in (("shift", shift), ("ignore_index", ignore_index)):
        if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
            raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if shift < 0:
        raise ValueError(f"shift: expected an int >= 0, got {shift}")
    if shift and not dimensions:
        raise ValueError(f"shift: expected 0 where labels have no dimension, got {shift}")


def terms(label_smoothing: float, z_loss: float) -> None:
    """Raise unless each term of the loss is in its range."""
    number("label_smoothing", label_smoothing)
    number("z_loss", z_loss)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing: expected a number from 0 to 1, got {label_smoothing}")
    if not z_loss >= 0:
        raise ValueError(f"z_loss: expected a number >= 0, got {z_loss}")


def reduction(value: str) -> None:
    """Raise unless the reduction exists."""
    if value not in _REDUCTIONS:
        raise ValueError(f"reduction: expected one of {', '.join(map(repr, _REDUCTIONS))}, got {value!r}")


def distillation(
    divergence: str,
    jsd_weight: float,
    temperature: float,
    hard_label_weight: float,
    fp32_upcast: bool,
    chunk_size: int,
) -> None:
    """Raise unless each number of a distillation is in its range."""
    if divergence not in _DIVERGENCES:
        raise ValueError(f"divergence: expected one of {', '.join(map(repr, _DIVERGENCES))}, got {divergence!r}")
    number("jsd_weight", jsd_weight)
    if not 0 < jsd_weight < 1:
        raise ValueError(f"jsd_weight: expected a number between 0 and 1, got {jsd_weight}")
    transform(None, temperature)
    number("hard_label_weight", hard_label_weight)
    if not 0 <= hard_label_weight <= 1:
        raise ValueError(f"hard_label_weight: expected a number from 0 to 1, got {hard_label_weight}")
    flag("fp32_upcast", fp32_upcast)
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int):
        raise TypeError(f"chunk_size: expected an int >= 0, got {type(chunk_size).__name__}")
    if chunk_size < 0:
        raise ValueError(f"chunk_size: expected an int >= 0, got {chunk_size}")


def flag(name: str, value: object) -> None:
    """Raise unless `value` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {type(value).__name__}")


def position_mask(value: Tensor, name: str, source: Tensor) -> None:
    """Raise unless `value` has one number for each row of `source`, the argument called `name`; nothing broadcasts."""
    tensor("position_mask", value)
    if value.dtype.is_complex:
        raise TypeError(f"position_mask: expected bool, integer or floating, got {value.dtype}")
    rows = source.shape[:-1]
    if value.shape not in (rows, torch.Size([*rows, 1])):
        raise ValueError(
            f"position_mask: expected the shape of {name} with 1 for its last dimension or without it, "
            f"{sizes(torch.Size([*rows, 1]))} or {sizes(rows)}, got {sizes(value.shape)}"
        )
    same_device("position_mask", value, source.device)


def soft_target(
    target_probs: Tensor | None,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    draft_to_target: Tensor | None,
    hidden: Tensor,
    columns: int,
    vocab: int,
) -> None:
    """Raise unless exactly one form of target is given, and fits; a rank has `columns` of V."""
    head_given = teacher_hidden is not None or teacher_weight is not None
    if (target_probs is not None) == head_given or (teacher_hidden is None) != (teacher_weight is None):
        named = {"target_probs": target_probs, "teacher_hidden": teacher_hidden, "teacher_weight": teacher_weight}
        given = ", ".join([name for name, value in named.items() if value is not None]) or "none of them"
        raise ValueError(f"target_probs: expected it, or teacher_hidden and teacher_weight, got {given}")
    if target_probs is not None:
        if draft_to_target is not None:
            raise ValueError("draft_to_target: expected None beside target_probs, which are the draft's, got one")
        tensor("target_probs", target_probs)
        floating("target_probs", target_probs)
        if target_probs.shape != (*hidden.shape[:-1], columns):
            expected = torch.Size([*hidden.shape[:-1], columns])
            raise ValueError(f"target_probs: expected [..., V] = {sizes(expected)}, got {sizes(target_probs.shape)}")
        same_device("target_probs", target_probs, hidden.device)
        if target_probs.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "target_probs: expected a tensor without gradient, got requires_grad=True: use target_probs.detach(), "
                "or masked_soft_cross_entropy() on logits, which gives it"
            )
        return
    assert teacher_hidden is not None and teacher_weight is not None
    teacher(teacher_hidden, teacher_weight, hidden, columns if draft_to_target is None else None)
    if draft_to_target is not None:
        tensor("draft_to_target", draft_to_target)
        if draft_to_target.dtype != torch.int64:
            raise TypeError(f"draft_to_target: expected int64, got {draft_to_target.dtype}: use draft_to_target.long()")
        if draft_to_target.shape != (vocab,):
            raise ValueError(f"draft_to_target: expected [V] = [{vocab}], got {sizes(draft_to_target.shape)}")
        same_device("draft_to_target", draft_to_target, hidden.device)


def multi_token(
    labels_: Tensor, depth: int, ignore_index: int, seq_idx: Tensor | None, cu_seqlens: Tensor | None
) -> None:
    """Raise unless targets of a depth can be made of the labels."""
    tensor("labels", labels_)
    labels(labels_, "hidden", labels_.shape, labels_.device)
    if labels_.dim() not in (1, 2):
        raise ValueError(f"labels: expected [B, S] or [S], got {sizes(labels_.shape)}")
    if isinstance(depth, bool) or not isinstance(depth, int):
        raise TypeError(f"depth: expected an int >= 0, got {type(depth).__name__}")
    if depth < 0:
        raise ValueError(f"depth: expected an int >= 0, got {depth}")
    alignment(0, ignore_index, labels_.dim())
    length = labels_.shape[-1:]
    for name, value in (("seq_idx", seq_idx), ("cu_seqlens", cu_seqlens)):
        if value is None:
            continue
        tensor(name, value)
        if value.dtype.is_floating_point or value.dtype.is_complex or value.dtype == torch.bool:
            raise TypeError(f"{name}: expected an integer dtype, got {value.dtype}")
        same_device(name, value, labels_.device)
    if seq_idx is not None and seq_idx.shape not in (labels_.shape, length, torch.Size([1, *length])):
        raise ValueError(
            f"seq_idx: expected the labels' shape {sizes(labels_.shape)} or {sizes(length)}, "
            f"got {sizes(seq_idx.shape)}: under pipelining give each microbatch its own"
        )
    if cu_seqlens is not None and (cu_seqlens.numel() < 2 or cu_seqlens.numel() != cu_seqlens.shape[-1]):
        raise ValueError(f"cu_seqlens: expected [sequences + 1], 2 at least, got {sizes(cu_seqlens.shape)}")


def sequence(name: str, value: Sequence[Tensor]) -> None:
    """Raise unless there is something for each depth."""
    if isinstance(value, Tensor) or not len(value):
        raise ValueError(f"{name}: expected a sequence of each depth's hidden states, one at least, got a tensor or []")


def depths(
    hidden: Sequence[Tensor],
    labels_: Tensor,
    targets: Sequence[Tensor] | None,
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None,
    scaling_factor: float,
) -> torch.Size:
    """The shape of a depth's tokens; raise unless each has hidden states and targets for the labels'."""
    sequence("hidden", hidden)
    tensor("labels", labels_)
    for k, states in enumerate(hidden):
        tensor(f"hidden[{k}]", states)
        if states.shape != hidden[0].shape or states.shape[:-1].numel() != labels_.numel():
            raise ValueError(
                f"hidden[{k}]: expected the labels' {sizes(labels_.shape)} tokens and one width, "
                f"got {sizes(states.shape)}"
            )
    scaling(scaling_factor)
    if targets is None:
        return hidden[0].shape[:-1]
    if seq_idx is not None or cu_seqlens is not None:
        raise ValueError("targets: expected None beside seq_idx or cu_seqlens, which they know already, got both")
    if len(targets) != len(hidden):
        raise ValueError(f"targets: expected one for each of {len(hidden)} depths, got {len(targets)}")
    for k, target in enumerate(targets):
        labels(target, "hidden", labels_.shape, labels_.device)
        if target.shape != labels_.shape:
            raise ValueError(f"targets[{k}]: expected {sizes(labels_.shape)}, got {sizes(target.shape)}")
    return hidden[0].shape[:-1]


def scaling(scaling_factor: float, alternative: str = "") -> None:
    """Raise unless an auxiliary loss can be weighed so."""
    number("scaling_factor", scaling_factor, alternative)
    if not scaling_factor >= 0:
        raise ValueError(f"scaling_factor: expected a number >= 0{alternative}, got {scaling_factor}")


def walks_tokens(strategy: str) -> None:
    """Raise unless the token walk, the only one for two distributions, may be taken."""
    if strategy == "vocab":
        raise ValueError("strategy: expected 'tokens' or 'auto', got 'vocab': two distributions need whole rows")


def count(num_label_tokens: int | Tensor | None, value: str, device: torch.device) -> None:
    """Raise unless `num_label_tokens` is a count, and goes with the reduction called `value`."""
    if num_label_tokens is None:
        return
    if value != "sum":
        raise ValueError(
            f"num_label_tokens: expected None unless reduction='sum', which it divides, got reduction={value!r}"
        )
    if isinstance(num_label_tokens, Tensor):
        if num_label_tokens.dtype.is_complex or num_label_tokens.dtype == torch.bool:
            raise TypeError(f"num_label_tokens: expected integer or floating, got {num_label_tokens.dtype}")
        if num_label_tokens.numel() != 1:
            raise ValueError(f"num_label_tokens: expected one element, got {sizes(num_label_tokens.shape)}")
        if num_label_tokens.device != device and (num_label_tokens.device.type != "cpu" or num_label_tokens.dim()):
            raise ValueError(f"num_label_tokens: expected on {device}, got {num_label_tokens.device}")
    elif isinstance(num_label_tokens, bool) or not isinstance(num_label_tokens, (int, torch.SymInt)):
        raise TypeError(f"num_label_tokens: expected an int, a tensor or None, got {type(num_label_tokens).__name__}")
    elif num_label_tokens < 0:
        raise ValueError(f"num_label_tokens: expected >= 0, got {num_label_tokens}")


def chunking(
    strategy: str, chunk_size: int | None, memory_budget: int | str | None, accumulate_dtype: object, compile: object
) -> None:
    """Raise unless the fields of a `Chunking` are each valid and go together."""
    if strategy not in _STRATEGIES:
        raise ValueError(f"strategy: expected one of {', '.join(map(repr, _STRATEGIES))}, got {strategy!r}")
    for name, value in (("chunk_size", chunk_size), ("memory_budget", size("memory_budget", memory_budget))):
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: expected an int >= 1 or None, got {type(value).__name__}")
        if value < 1:
            raise ValueError(f"{name}: expected an int >= 1 or None, got {value}")
    if chunk_size is not None and memory_budget is not None:
        raise ValueError("memory_budget: expected None where chunk_size is given, got both: they say the same thing")
    if accumulate_dtype not in (None, torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise TypeError(f"accumulate_dtype: expected a floating torch.dtype or None, got {accumulate_dtype!r}")
    if not isinstance(compile, bool) and compile != "auto":
        raise ValueError(f"compile: expected True, False or 'auto', got {compile!r}")


def size(name: str, value: int | str | None) -> int | None:
    """Bytes, of a number of them or of a text such as "512MiB"; whatever else it is is left to be found out."""
    if not isinstance(value, str):
        return value
    for unit, power in (("KiB", 10), ("MiB", 20), ("GiB", 30), ("TiB", 40)):
        number = value.strip().removesuffix(unit).rstrip()
        if number != value.strip() and number.replace(".", "", 1).isdecimal():
            return int(float(number) * 2**power)
    raise ValueError(f"{name}: expected a number of bytes or a text such as '512MiB' or '1.5 GiB', got {value!r}")


def max_label_tokens(value: float | None) -> None:
    """Raise unless it is a number of tokens or a fraction of them."""
    expected = "expected an int >= 1, a float above 0 and up to 1, or None"
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"max_label_tokens: {expected}, got {type(value).__name__}")
    if not (0 < value <= 1 if isinstance(value, float) else value >= 1):
        raise ValueError(f"max_label_tokens: {expected}, got {value}")


def label_tokens_fit(count: int, rows: int, tokens: int) -> None:
    """Raise unless the tokens that count are as few as `max_label_tokens` promised."""
    if count > rows:
        raise ValueError(
            f"max_label_tokens: expected at least {count} of {tokens} tokens, so many count, got {rows}; "
            "in compiled code and on accelerators the loss would be NaN"
        )


def chunk_size_counts_tokens(chunk_size: int) -> None:
    """Raise: under "auto" a chunk size is one of tokens, and only the vocabulary walk can do what is asked."""
    raise ValueError(
        f"chunk_size: expected strategy='vocab' beside it, got 'auto': what is asked needs the vocabulary walk, "
        f"whose chunks are columns of the vocabulary, not {chunk_size} tokens"
    )


def memory_budget(value: int, chunk: str, needed: int) -> None:
    """Raise unless the budget holds the least chunk."""
    if value < needed:
        raise ValueError(f"memory_budget: expected at least {needed} bytes, one {chunk} of logits, got {value}")


def accumulator(accumulate_dtype: torch.dtype, dtype: torch.dtype) -> None:
    """Raise unless sums in `accumulate_dtype` lose nothing that `dtype` holds."""
    if torch.promote_types(accumulate_dtype, dtype) != accumulate_dtype:
        raise ValueError(f"accumulate_dtype: expected {dtype} like the inputs or wider, got {accumulate_dtype}")


def tokens_strategy(reason: str) -> None:
    """Raise: the token walk cannot do what is asked."""
    raise ValueError(
        f"strategy: expected 'vocab' or 'auto', got 'tokens', which cannot give {reason}: "
        "it forms gradients before it knows each token's upstream gradient"
    )


def labels_in_range(bad: Tensor, values: Tensor, vocab: int, ignore_index: int) -> None:
    """Raise if any is marked bad. Reads the tensors: for eager CPU code alone."""
    if bad.any():
        first = values[bad].reshape(-1)[0].item()
        raise ValueError(f"labels: expected 0 <= label < V = {vocab}, or ignore_index = {ignore_index}, got {first}")


def first_derivative() -> None:
    """Raise in a backward that is to be differentiated again; a compiled one is refused by AOTAutograd itself."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "create_graph: expected False, got True: this loss has no second derivative outside torch.func transforms; "
            "take it with torch.func, or from the functions of compiled_loss.reference"
        )


def sizes(shape: torch.Size) -> str:
    """As errors write it."""
    return "[" + ", ".join([str(int(size)) for size in shape]) + "]"
