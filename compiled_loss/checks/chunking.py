"""Checks of `Chunking`, by itself and together with a call."""

from __future__ import annotations

import torch

_STRATEGIES = ("auto", "tokens", "vocab")


def whole_rows(strategy: str) -> None:
    """Raises unless the token strategy is allowed, the only one for two distributions."""
    if strategy == "vocab":
        raise ValueError("strategy: expected 'tokens' or 'auto', got 'vocab': two distributions need whole rows")


def chunking(
    strategy: str, chunk_size: int | None, memory_budget: int | str | None, accumulate_dtype: object, compile: object
) -> None:
    """Raises unless the fields of a `Chunking` are each valid and go together."""
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
    compiles(compile)


def compiles(compile: object) -> None:
    """Raises unless the value says whether eager calls are compiled."""
    if not isinstance(compile, bool) and compile != "auto":
        raise ValueError(f"compile: expected True, False or 'auto', got {compile!r}")


def size(name: str, value: int | str | None) -> int | None:
    """Returns a number of bytes, which may be given as a text such as "512MiB".

    Any value that is not a text is returned as it is, and checked elsewhere.
    """
    if not isinstance(value, str):
        return value
    for unit, power in (("KiB", 10), ("MiB", 20), ("GiB", 30), ("TiB", 40)):
        number = value.strip().removesuffix(unit).rstrip()
        if number != value.strip() and number.replace(".", "", 1).isdecimal():
            return int(float(number) * 2**power)
    raise ValueError(f"{name}: expected a number of bytes or a text such as '512MiB' or '1.5 GiB', got {value!r}")


def max_label_tokens(value: float | None) -> None:
    """Raises unless the value is a number of tokens or a fraction of them."""
    expected = "expected an int >= 1, a float above 0 and up to 1, or None"
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"max_label_tokens: {expected}, got {type(value).__name__}")
    if not (0 < value <= 1 if isinstance(value, float) else value >= 1):
        raise ValueError(f"max_label_tokens: {expected}, got {value}")


def label_tokens_fit(count: int, rows: int, tokens: int) -> None:
    """Raises unless as few tokens count as `max_label_tokens` promised."""
    if count > rows:
        raise ValueError(
            f"max_label_tokens: expected at least {count}, for so many of {tokens} tokens count, got {rows}; "
            "in compiled code and on accelerators the loss would be NaN"
        )


def chunk_size_counts_tokens(chunk_size: int) -> None:
    """Raises an error: under "auto" a chunk size is one of tokens, and only the vocab strategy can do what is asked."""
    raise ValueError(
        f"chunk_size: expected strategy='vocab' beside it, got 'auto': what is asked needs the vocab strategy, "
        f"whose chunks are columns of the vocabulary, not {chunk_size} tokens"
    )


def positive(name: str, value: int) -> None:
    """Raises unless `value` is an int, 1 or more."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int >= 1, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name}: expected an int >= 1, got {value}")


def device_type(device: str) -> None:
    """Raises unless the rates of this type of device are known."""
    if device not in ("cuda", "cpu"):
        raise ValueError(f"device: expected 'cuda' or 'cpu', got {device!r}")


def memory_budget(value: int, chunk: str, needed: int) -> None:
    """Raises unless the budget holds the least chunk."""
    if value < needed:
        raise ValueError(f"memory_budget: expected at least {needed} bytes, one {chunk} of logits, got {value}")


def accumulator(accumulate_dtype: torch.dtype, dtype: torch.dtype) -> None:
    """Raises unless sums in `accumulate_dtype` lose nothing that `dtype` holds."""
    if torch.promote_types(accumulate_dtype, dtype) != accumulate_dtype:
        raise ValueError(f"accumulate_dtype: expected {dtype} like the inputs or wider, got {accumulate_dtype}")


def tokens_strategy(reason: str) -> None:
    """Raises an error: the token strategy cannot do what is asked."""
    raise ValueError(
        f"strategy: expected 'vocab' or 'auto', got 'tokens', which cannot give {reason}: "
        "it forms gradients before it knows each token's upstream gradient"
    )
