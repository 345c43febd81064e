"""Train a draft model for speculative decoding as EAGLE-3 does, on its target's distribution and not on labels.

The draft reads the target's hidden states of low, middle and high layers, and the token that came next. It predicts
what the target will say after that, but only over a draft vocabulary, the most frequent tokens:

    loss = linear_soft_cross_entropy(draft_hidden, draft_weight, position_mask, teacher_hidden=target_hidden,
                                     teacher_weight=target_weight, draft_to_target=draft_to_target)

draws the soft targets from the target's own head, chunk by chunk: no probabilities are stored, nor any logits of
[tokens, vocabulary]. `position_mask` leaves out the positions that do not count: here those whose token the draft has
no word for. EAGLE-3 feeds the draft its own output for a few more steps, and adds up this loss of each.

Here the target learns the sources of Python's standard library for a while, in place of one you would load. The figure
of merit is the acceptance on text that neither trained on: the sum over the vocabulary of min(target, draft), which is
the probability that speculative sampling keeps a drafted token.

    python examples/eagle_draft.py
"""

import argparse
import re
from collections import Counter

import torch
from torch import nn

from compiled_loss import linear_cross_entropy, linear_soft_cross_entropy
from compiled_loss.demo.text import sources  # of the standard library: text that every machine has

VOCAB, DRAFT_VOCAB, WIDTH, LENGTH, SEQUENCES = 2048, 512, 128, 64, 16
HELD_OUT = 20_000  # tokens


class Block(nn.TransformerEncoderLayer):
    def __init__(self):
        super().__init__(WIDTH, 2, 4 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True, bias=False)

    def forward(self, hidden):
        mask = nn.Transformer.generate_square_subsequent_mask(hidden.shape[1], device=hidden.device)
        return super().forward(hidden, mask, is_causal=True)


class Target(nn.Module):
    """Tokens [B, S] to what its head reads, [B, S, WIDTH], and the features of three depths, [B, S, 3 WIDTH]."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)  # its weight is the head's as well
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.position = nn.Parameter(torch.zeros(LENGTH, WIDTH))
        self.blocks = nn.ModuleList((Block(), Block()))
        self.norm = nn.RMSNorm(WIDTH)

    def forward(self, tokens):
        states = [self.embedding(tokens) + self.position]
        for layer in self.blocks:
            states.append(layer(states[-1]))
        states[-1] = self.norm(states[-1])
        return states[-1], torch.cat(states, -1)


class Draft(nn.Module):
    """The target's features, and embeddings of the tokens that came next, to hidden states of a head of its own."""

    def __init__(self):
        super().__init__()
        self.fuse = nn.Linear(4 * WIDTH, WIDTH, bias=False)
        self.block = Block()
        self.norm = nn.RMSNorm(WIDTH)
        self.head = nn.Linear(WIDTH, DRAFT_VOCAB, bias=False)

    def forward(self, features, following):
        return self.norm(self.block(self.fuse(torch.cat((features, following), -1))))


def text():
    """The standard library's words, as tokens [T]; rare words share the last."""
    words = re.findall(r"\w+|\n\s*|[^\w\s]", "\n".join(sources(1_000_000)))
    number = {word: i for i, (word, _) in enumerate(Counter(words).most_common(VOCAB - 1))}
    return torch.tensor([number.get(word, VOCAB - 1) for word in words])


def batch(tokens):
    """Windows [SEQUENCES, LENGTH + 1] from random places of the text."""
    starts = torch.randint(len(tokens) - LENGTH, (SEQUENCES, 1), device=tokens.device)
    return tokens[starts + torch.arange(LENGTH + 1, device=tokens.device)]


def train(name, parameters, loss_of, tokens, steps):
    optimizer = torch.optim.AdamW(parameters, lr=3e-3, fused=True)
    for number in range(1, steps + 1):
        optimizer.zero_grad()
        loss = loss_of(batch(tokens))
        loss.backward()
        optimizer.step()
        if number in (1, steps) or number % max(1, steps // 5) == 0:
            print(f"{name} step {number:>4}/{steps}   loss {loss.item():.3f}", flush=True)


def main():
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="of each training (default: %(default)s)")
    parser.add_argument("--device", choices=devices, default=devices[0], help="default: %(default)s")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="run the step eagerly")
    given = parser.parse_args()

    torch.manual_seed(0)
    tokens = text().to(given.device)
    training, held_out = tokens[:-HELD_OUT], batch(tokens[-HELD_OUT:])
    draft_to_target = training.bincount(minlength=VOCAB).topk(DRAFT_VOCAB).indices
    target, draft = Target().to(given.device), Draft().to(given.device)

    def target_loss(window):
        hidden, _ = target(window[:, :-1])
        return linear_cross_entropy(hidden, target.embedding.weight, window[:, 1:])

    @torch.no_grad()
    def read(window):
        """What the draft reads, and the target's hidden states that it should match, all [B, LENGTH - 1, ...]."""
        target_hidden, features = target(window[:, :-1])
        return features[:, :-1], target.embedding(window[:, 1:-1]), target_hidden[:, 1:]

    @torch.compile(fullgraph=True, disable=not given.compile)
    def draft_loss(labels, features, following, target_hidden):
        return linear_soft_cross_entropy(
            draft(features, following),
            draft.head.weight,
            torch.isin(labels, draft_to_target),
            teacher_hidden=target_hidden,
            teacher_weight=target.embedding.weight,
            draft_to_target=draft_to_target,
        )

    @torch.no_grad()
    def acceptance():
        """Mean acceptance on the held-out text, and how much of the target's probability the vocabulary covers."""
        features, following, target_hidden = read(held_out)
        p = (target_hidden @ target.embedding.weight.t()).softmax(-1)[..., draft_to_target]
        q = draft.head(draft(features, following)).softmax(-1)
        return f"{torch.minimum(p, q).sum(-1).mean().item():.1%} (at most {p.sum(-1).mean().item():.1%})"

    train("target", target.parameters(), target_loss, training, given.steps)
    target.requires_grad_(False)
    print("acceptance before:", acceptance())
    print("the draft's step:", "compiling ..." if given.compile else "eager", flush=True)
    train("draft", draft.parameters(), lambda window: draft_loss(window[:, 2:], *read(window)), training, given.steps)
    print("acceptance after:", acceptance())


if __name__ == "__main__":
    main()
