"""A small causal transformer.

B sequences, S positions, H width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from compiled_loss.demo.settings import HEAD_WIDTH, SEQUENCE


class Transformer(nn.Module):
    """A transformer from tokens [B, S] to hidden states [B, S, H]; the embedding's weight is the head's as well.

    The blocks are checkpointed, as they are in practice where memory is scarce. Then the logits fill the memory.
    """

    def __init__(self, vocab: int, width: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        cos, sin = rotations(SEQUENCE, HEAD_WIDTH)
        self.register_buffer("cos", cos)
        self.register_buffer("sin", sin)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        for block in self.blocks:
            hidden = checkpoint(block, hidden, self.cos, self.sin, use_reentrant=False)
        normalised: Tensor = self.norm(hidden)
        return normalised


class Block(nn.Module):
    """Attention and a two-layer perceptron, each on the normalised stream."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.RMSNorm(width)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        heads = self.qkv(self.attention_norm(hidden)).unflatten(-1, (3, -1, HEAD_WIDTH))
        query, key, value = heads.transpose(1, 3).unbind(2)  # [B, heads, S, HEAD_WIDTH] each
        attended = F.scaled_dot_product_attention(rotate(query, cos, sin), rotate(key, cos, sin), value, is_causal=True)
        hidden = hidden + self.out(attended.transpose(1, 2).flatten(-2))
        update: Tensor = self.down(F.gelu(self.up(self.mlp_norm(hidden))))
        return hidden + update


def rotations(positions: int, width: int) -> tuple[Tensor, Tensor]:
    """Returns cosines and sines, [positions, width / 2], of rotary positions (RoFormer, section 3.4)."""
    frequencies = 10000.0 ** (-torch.arange(0, width, 2) / width)
    angles = torch.outer(torch.arange(positions), frequencies)
    return angles.cos(), angles.sin()


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns each pair of a head's halves by its position's angle."""
    left, right = heads.chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)
