"""Real text that every machine has: the sources of Python's standard library, as tokens."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from compiled_loss.demo.child import Event, serve
from compiled_loss.demo.settings import SEED, SEQUENCE

SAMPLE_BYTES = 8_000_000  # enough for a vocabulary of 32768, seconds to encode
SEPARATOR = "<|end of file|>"


def sources(most_bytes: int = SAMPLE_BYTES) -> list[str]:
    """Returns the files of the standard library in the order of their paths, until they exceed `most_bytes`."""
    texts: list[str] = []
    size = 0
    for folder, folders, files in os.walk(sysconfig.get_path("stdlib")):
        folders[:] = sorted(set(folders) - {"site-packages", "dist-packages"})
        for name in sorted(files):
            if name.endswith(".py"):
                texts.append(Path(folder, name).read_text(encoding="utf-8", errors="replace"))
                size += len(texts[-1])
                if size > most_bytes:
                    return texts
    if not texts:
        raise RuntimeError(f"no sources of the standard library in {sysconfig.get_path('stdlib')}")
    return texts


def encode(texts: list[str], vocab: int) -> tuple[list[int], int]:
    """Returns the tokens of `texts` under a byte-pair encoding trained on them, and the number of kinds of token."""
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.trainers import BpeTrainer

    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    trainer = BpeTrainer(
        vocab_size=vocab, special_tokens=[SEPARATOR], initial_alphabet=ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokens = [token for file in tokenizer.encode_batch([text + SEPARATOR for text in texts]) for token in file.ids]
    return tokens, tokenizer.get_vocab_size()


def batches(tokens: Tensor, tokens_a_step: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields inputs and labels, [sequences, SEQUENCE] each, without end, in the same order every time."""
    sequences = tokens_a_step // SEQUENCE
    windows = tokens.unfold(0, SEQUENCE + 1, SEQUENCE)
    generator = torch.Generator().manual_seed(SEED)
    order = torch.empty(0, dtype=torch.int64)
    while True:
        while len(order) < sequences:
            order = torch.cat((order, torch.randperm(len(windows), generator=generator)))
        batch, order = windows[order[:sequences]], order[sequences:]
        yield batch[:, :-1].contiguous(), batch[:, 1:].contiguous()


def prepare(path: str, vocab: int) -> Iterator[Event]:
    """Saves the tokens at `path`, and reports their number and the vocabulary that they need."""
    tokens, found = encode(sources(), vocab)
    torch.save(torch.tensor(tokens), path)
    yield {"tokens": len(tokens), "vocab": found}


if __name__ == "__main__":
    serve(prepare)
