"""Group-relative policy optimisation of a small language model, whose reward is a program.

    found = linear_policy_loss(hidden, head, sampled, old_logprob, advantages, reference_logprob=..., clip_high=0.28)

takes hidden states and a head, and gives the clipped loss, its KL to a reference policy, its entropy bonus and what one
logs, without the logits. The sampler's log-probabilities come from `linear_token_statistics` of the same head.

Here the policy learns the sources of Python's standard library for a while, in place of one you would load. Then it
writes continuations, and a program rewards those whose brackets close. Each group of continuations of one prompt shares
a baseline; a step of sampling is followed by two updates, so that ratios leave 1.

    python examples/grpo.py
    python examples/grpo.py --steps 200 --picture grpo.png
"""

import argparse
import copy
from functools import partial
from pathlib import Path

import torch
from torch import nn

from compiled_loss import (
    linear_cross_entropy,
    linear_policy_loss,
    linear_token_statistics,
    make_token_weights,
)
from compiled_loss.demo.text import sources  # of the standard library: text that every machine has
from compiled_loss.pictures import write

VOCAB, PROMPT, LENGTH, WIDTH = 128, 32, 32, 128
PROMPTS, GROUP, UPDATES = 8, 8, 2
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


def batches(count, device):
    """Windows [PROMPTS * GROUP, PROMPT + LENGTH + 1] of text."""
    text = "".join(sources(400_000))
    codes = torch.tensor([min(ord(c), VOCAB - 1) for c in text], device=device)
    for _ in range(count):
        starts = torch.randint(0, len(codes) - PROMPT - LENGTH - 1, (PROMPTS * GROUP,))
        yield torch.stack([codes[i : i + PROMPT + LENGTH + 1] for i in starts.tolist()])


def reward(text):
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
    """Continuations [B, PROMPT + LENGTH] of prompts [B, PROMPT]."""
    tokens = prompts
    for _ in range(LENGTH):
        logits = policy(tokens)[:, -1] @ policy.head.t()
        tokens = torch.cat([tokens, torch.multinomial(logits.softmax(-1), 1)], 1)
    return tokens


@torch.no_grad()
def logprobs(policy, tokens):
    """Log-probabilities of the tokens that were sampled [B, LENGTH]."""
    hidden = policy(tokens[:, :-1])[:, PROMPT - 1 :]
    return linear_token_statistics(hidden, policy.head, tokens[:, PROMPT:], wanted=("logprob",)).logprob


def learn(policy, steps, device):
    """The text itself, for a start."""
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3)
    for tokens in batches(steps, device):
        loss = linear_cross_entropy(policy(tokens[:, :-1]), policy.head, tokens[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def step(policy, reference, optimizer, prompts, options):
    """Sample, reward, update: the mean reward and the last update's metrics."""
    tokens = sample(policy, prompts)
    texts = ["".join(map(chr, row)) for row in tokens[:, PROMPT:].tolist()]
    rewards = torch.tensor([reward(text) for text in texts], device=tokens.device)
    groups = rewards.view(PROMPTS, GROUP)
    advantages = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
    old, beside = logprobs(policy, tokens), logprobs(reference, tokens)
    weights = make_token_weights(torch.ones_like(old), "token_mean")
    for _ in range(UPDATES):
        hidden = policy(tokens[:, :-1])[:, PROMPT - 1 :]
        found = linear_policy_loss(
            hidden,
            policy.head,
            tokens[:, PROMPT:],
            old,
            advantages.view(-1, 1),
            token_weights=weights,
            reference_logprob=beside,
            **options,
        )
        found.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return rewards.mean().item(), found.metrics


def picture(rows):
    """Draw reward, KL, clipped tokens and entropy over the steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True)
    for axis, name in zip(axes.flat, ("reward", "KL to the reference", "clipped", "entropy"), strict=True):
        axis.plot([row[name] for row in rows])
        axis.set_title(name)
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="of sampling, each followed by updates")
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    parser.add_argument("--device", choices=devices, default=devices[0], help="default: %(default)s")
    parser.add_argument("--kl", type=float, default=0.02, help="coefficient of the KL to the policy of the start")
    parser.add_argument("--entropy", type=float, default=0.001, help="coefficient of the entropy bonus")
    parser.add_argument("--picture", type=Path, help="where to write a picture of the run, NAME.png and NAME-dark.png")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    policy = Policy().to(arguments.device)
    learn(policy, 4 * arguments.steps, arguments.device)
    reference = copy.deepcopy(policy).requires_grad_(False)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-4)
    options = {"clip_high": 0.28, "kl_coefficient": arguments.kl, "entropy_coefficient": arguments.entropy}
    rows = []
    print("step  reward  KL to the reference  clipped  entropy")
    for i, tokens in enumerate(batches(arguments.steps, arguments.device)):
        prompts = tokens[::GROUP, :PROMPT].repeat_interleave(GROUP, 0)
        mean, metrics = step(policy, reference, optimizer, prompts, options)
        clipped = (metrics.clipped_low + metrics.clipped_high).item()
        row = {
            "reward": mean,
            "KL to the reference": metrics.kl_to_reference.item(),
            "clipped": clipped,
            "entropy": metrics.entropy.item(),
        }
        rows.append(row)
        if i % max(1, arguments.steps // 20) == 0 or i == arguments.steps - 1:
            print(f"{i:4}  {mean:6.3f}  {row['KL to the reference']:19.4f}  {clipped:7.3f}  {row['entropy']:7.3f}")
    tenth = max(1, len(rows) // 10)
    first, last = (sum(row["reward"] for row in part) / tenth for part in (rows[:tenth], rows[-tenth:]))
    print(f"mean reward of the first and of the last tenth of the steps: {first:.3f}, {last:.3f}")
    if arguments.picture:
        write(partial(picture, rows), arguments.picture, dpi=120)


if __name__ == "__main__":
    main()
