"""Train a draft model for speculative decoding as EAGLE-3 does, on its target's distribution and not on labels.

The draft reads the target's hidden states of low, middle and high layers, and the token that came next. It predicts
what the target will say after that, but only over a draft vocabulary, the most frequent tokens:

    loss = linear_soft_cross_entropy(
        draft_hidden, draft_weight, position_mask,
        teacher_hidden=target_hidden, teacher_weight=target_weight, draft_to_target=draft_to_target,
    )

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

VOCAB, DRAFT_VOCAB, WIDTH, LENGTH, SEQUENCES = 4096, 1024, 128, 64, 32


def block():
    return nn.TransformerEncoderLayer(WIDTH, 2, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)


def causal(hidden):
    return {
        "src_mask": nn.Transformer.generate_square_subsequent_mask(hidden.shape[1], device=hidden.device),
        "is_causal": True,
    }


class Target(nn.Module):
    """Tokens [B, S] to what its head reads, [B, S, WIDTH], and the features of three depths, [B, S, 3 WIDTH]."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)  # its weight is the head's as well
        self.position = nn.Embedding(LENGTH, WIDTH)
        for embedding in (self.embedding, self.position):
            nn.init.normal_(embedding.weight, std=0.02)
        self.blocks = nn.ModuleList((block(), block()))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, tokens):
        states = [self.embedding(tokens) + self.position.weight]
        for layer in self.blocks:
            states.append(layer(states[-1], **causal(states[-1])))
        states[-1] = self.norm(states[-1])
        return states[-1], torch.cat(states, -1)


class Draft(nn.Module):
    """The target's features, and embeddings of the tokens that came next, to hidden states of a head of its own."""

    def __init__(self):
        super().__init__()
        self.fuse = nn.Linear(4 * WIDTH, WIDTH)
        self.block = block()
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, DRAFT_VOCAB, bias=False)

    def forward(self, features, following):
        hidden = self.fuse(torch.cat((features, following), -1))
        return self.norm(self.block(hidden, **causal(hidden)))


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
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, fused=True)
    for number in range(1, steps + 1):
        optimizer.zero_grad()
        loss = loss_of(batch(tokens))
        loss.backward()
        optimizer.step()
        if number % max(1, steps // 5) == 0 or number == 1:
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
    training, held_out = tokens[: -len(tokens) // 10], batch(tokens[-len(tokens) // 10 :])
    draft_to_target = training.bincount(minlength=VOCAB).topk(DRAFT_VOCAB).indices
    drafted = torch.zeros(VOCAB, dtype=torch.bool, device=given.device)
    drafted[draft_to_target] = True

    target, draft = Target().to(given.device), Draft().to(given.device)

    def target_loss(window):
        hidden, _ = target(window[:, :-1])
        return linear_cross_entropy(hidden, target.embedding.weight, window[:, 1:])

    def hidden_states(window):
        """Draft's and target's, [B, LENGTH - 1, WIDTH] each, of the same next token: window[:, 2:]."""
        with torch.no_grad():
            target_hidden, features = target(window[:, :-1])
            following = target.embedding(window[:, 1:-1])
        return draft(features[:, :-1], following), target_hidden[:, 1:]

    def draft_loss(window):
        draft_hidden, target_hidden = hidden_states(window)
        return linear_soft_cross_entropy(
            draft_hidden,
            draft.head.weight,
            drafted[window[:, 2:]],
            teacher_hidden=target_hidden,
            teacher_weight=target.embedding.weight,
            draft_to_target=draft_to_target,
        )

    @torch.no_grad()
    def acceptance():
        """Mean acceptance on the held-out text, and how much of the target's probability the vocabulary covers."""
        draft_hidden, target_hidden = hidden_states(held_out)
        p = (target_hidden @ target.embedding.weight.t()).softmax(-1)[..., draft_to_target]
        q = draft.head(draft_hidden).softmax(-1)
        return f"{torch.minimum(p, q).sum(-1).mean().item():.1%} (at most {p.sum(-1).mean().item():.1%})"

    train("target", target.parameters(), target_loss, training, given.steps)
    target.requires_grad_(False)
    print("acceptance before:", acceptance(), flush=True)
    step = torch.compile(draft_loss, fullgraph=True) if given.compile else draft_loss
    train("draft", draft.parameters(), step, training, given.steps)
    print("acceptance after:", acceptance())


if __name__ == "__main__":
    main()
