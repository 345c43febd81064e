"""Direct preference optimisation of a small language model, whose preferences are a program's.

    found = linear_preference_loss(hidden, head, answers, reference_logprob=cached, beta=0.2)

takes hidden states and a head, and gives the loss of pairs and what one logs, without the logits. The chosen answers
are the first half of the rows, the rejected the second.

Here the policy learns the sources of Python's standard library for a while, in place of one you would load. Then it
writes two continuations of each prompt, and a program prefers the one whose brackets close. What the reference, the
policy of the start, thinks of them is computed once, and kept: two numbers a pair. At the end new continuations are
judged by the same program.

    python examples/dpo.py
    python examples/dpo.py --steps 200 --picture dpo.png
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from torch import nn

from compiled_loss import linear_cross_entropy, linear_preference_loss
from compiled_loss.demo.text import sources  # of the standard library: text that every machine has
from compiled_loss.pictures import write

VOCAB, PROMPT, LENGTH, WIDTH = 128, 32, 32, 128
PAIRS, POOL = 16, 256
OPEN, CLOSE = "([{", ")]}"


class Policy(nn.Module):
    """Characters [B, S] to hidden states [B, S, WIDTH]."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.position = nn.Parameter(torch.zeros(PROMPT + LENGTH, WIDTH))
        self.block = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True)
        self.norm = nn.RMSNorm(WIDTH)
        nn.init.normal_(self.embedding.weight, std=0.02)

    @property
    def head(self):  # [V, WIDTH]
        return self.embedding.weight

    def forward(self, tokens):
        length = tokens.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=tokens.device)
        hidden = self.embedding(tokens) + self.position[:length]
        return self.norm(self.block(hidden, mask, is_causal=True))


def windows(count, device):
    """Windows [count, PROMPT + LENGTH + 1] of text."""
    text = "".join(sources(400_000))
    codes = torch.tensor([min(ord(c), VOCAB - 1) for c in text], device=device)
    starts = torch.randint(0, len(codes) - PROMPT - LENGTH - 1, (count,))
    return torch.stack([codes[i : i + PROMPT + LENGTH + 1] for i in starts.tolist()])


def quality(text):
    """From 0 to 1: the share of brackets that are closed by their own kind; 0 where there is none."""
    stack, right, count = [], 0, 0
    for c in text:
        if c in OPEN:
            stack.append(c)
            count += 1
        elif c in CLOSE:
            count += 1
            if stack and OPEN.index(stack[-1]) == CLOSE.index(c):
                stack.pop()
                right += 2
    return right / count if count else 0.0


@torch.no_grad()
def sample(policy, prompts):
    """Continuations [B, PROMPT + LENGTH] of prompts [B, PROMPT], and the quality of each [B]."""
    tokens = prompts
    for _ in range(LENGTH):
        logits = policy(tokens)[:, -1] @ policy.head.t()
        tokens = torch.cat([tokens, torch.multinomial(logits.softmax(-1), 1)], 1)
    texts = ["".join(map(chr, row)) for row in tokens[:, PROMPT:].tolist()]
    return tokens, torch.tensor([quality(text) for text in texts], device=tokens.device)


def learn(policy, steps, device):
    """The text itself, for a start."""
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3)
    text = windows(64 * steps, device)
    for tokens in text.split(64):
        loss = linear_cross_entropy(policy(tokens[:, :-1]), policy.head, tokens[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def loss_of(policy, chosen, rejected, **options):
    """That of pairs [P, PROMPT + LENGTH] each, whose answers begin after the prompt."""
    tokens = torch.cat([chosen, rejected])
    answers = tokens.masked_fill(torch.arange(PROMPT + LENGTH, device=tokens.device) < PROMPT, -100)
    return linear_preference_loss(policy(tokens), policy.head, answers, shift=1, **options)


def preferences(policy, device):
    """(chosen, rejected, their log-probabilities [P, 2]) of prompts whose continuations differ in quality."""
    prompts = windows(POOL, device)[:, :PROMPT]
    (one, first), (other, second) = sample(policy, prompts), sample(policy, prompts)
    differ = first != second
    better = (first > second).unsqueeze(1)
    chosen, rejected = (torch.where(better, a, b)[differ] for a, b in ((one, other), (other, one)))
    cached = []
    with torch.no_grad():
        for pair in zip(chosen.split(PAIRS), rejected.split(PAIRS), strict=True):
            cached.append(loss_of(policy, *pair).sequence_logprob.view(2, -1).t())
    return chosen, rejected, torch.cat(cached)


def picture(rows):
    """Draw rewards, margin, accuracy and loss over the steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True)
    for axis, names in zip(axes.flat, (("chosen", "rejected"), ("margin",), ("accuracy",), ("loss",)), strict=True):
        for name in names:
            axis.plot([row[name] for row in rows], label=name)
        axis.set_title("reward" if len(names) > 1 else names[0])
    axes.flat[0].legend()
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="of preference optimisation")
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    parser.add_argument("--device", choices=devices, default=devices[0], help="default: %(default)s")
    parser.add_argument("--beta", type=float, default=0.2, help="how close the policy stays to the reference")
    parser.add_argument("--kind", default="sigmoid", help="of loss; see compiled_loss.preference_loss")
    parser.add_argument("--picture", type=Path, help="where to write a picture of the run, NAME.png and NAME-dark.png")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    policy = Policy().to(arguments.device)
    learn(policy, 4 * arguments.steps, arguments.device)
    prompts = windows(POOL, arguments.device)[:, :PROMPT]
    before = sample(policy, prompts)[1].mean().item()
    chosen, rejected, cached = preferences(policy, arguments.device)
    print(f"{len(chosen)} pairs of {POOL} prompts")
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-4)
    rows = []
    print("step  chosen  rejected  margin  accuracy    loss")
    for i in range(arguments.steps):
        some = torch.randint(0, len(chosen), (PAIRS,), device=arguments.device)
        found = loss_of(
            policy,
            chosen[some],
            rejected[some],
            reference_logprob=cached[some].t().flatten(),
            beta=arguments.beta,
            kind=arguments.kind,
        )
        found.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        metrics = found.metrics
        row = {
            "chosen": metrics.reward_chosen.item(),
            "rejected": metrics.reward_rejected.item(),
            "margin": metrics.reward_margin.item(),
            "accuracy": metrics.accuracy.item(),
            "loss": found.loss.item(),
        }
        rows.append(row)
        if i % max(1, arguments.steps // 20) == 0 or i == arguments.steps - 1:
            print("{:4}  {chosen:6.3f}  {rejected:8.3f}  {margin:6.3f}  {accuracy:8.3f}  {loss:6.4f}".format(i, **row))
    after = sample(policy, prompts)[1].mean().item()
    print(f"mean quality of continuations before and after: {before:.3f}, {after:.3f}")
    if arguments.picture:
        write(partial(picture, rows), arguments.picture, dpi=120)


if __name__ == "__main__":
    main()
