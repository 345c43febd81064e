"""Distillation from a frozen teacher, wider than its student, without either's logits.

    loss = linear_distillation(student_hidden, student_weight, teacher_hidden, teacher_weight, labels)

takes both models' last hidden states and heads, whose widths may differ, and goes through the tokens in chunks: nothing
of [tokens, vocabulary] is ever held. `hard_label_weight` mixes in the labels' own cross-entropy, from the same pass.

Here the teacher learns the sources of Python's standard library for a while, in place of one you would load. Then the
student learns from it. On text that neither trained on, the divergence falls and they agree more often on the most
likely next token.

    python examples/distillation.py
    python examples/distillation.py --divergence reverse_kl --temperature 1 --hard-label-weight 0.5
"""

import argparse
import re
from collections import Counter

import torch
from torch import nn

from compiled_loss import linear_cross_entropy, linear_distillation
from compiled_loss.demo.text import sources  # of the standard library: text that every machine has

VOCAB, LENGTH, SEQUENCES = 2048, 64, 16
HELD_OUT = 20_000  # tokens
TEACHER_WIDTH, STUDENT_WIDTH = 192, 64


class Block(nn.TransformerEncoderLayer):
    def __init__(self, width):
        super().__init__(width, 2, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True, bias=False)

    def forward(self, hidden):
        mask = nn.Transformer.generate_square_subsequent_mask(hidden.shape[1], device=hidden.device)
        return super().forward(hidden, mask, is_causal=True)


class Model(nn.Module):
    """Tokens [B, S] to hidden states [B, S, width]."""

    def __init__(self, width):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.position = nn.Parameter(torch.zeros(LENGTH, width))
        self.block = Block(width)
        self.norm = nn.RMSNorm(width)

    @property
    def head(self):  # [V, width]
        return self.embedding.weight

    def forward(self, inputs):
        hidden = self.embedding(inputs) + self.position
        return self.norm(self.block(hidden))


def text():
    """The standard library's words, as tokens [T]; rare words share the last."""
    words = re.findall(r"\w+|\n\s*|[^\w\s]", "\n".join(sources(1_000_000)))
    number = {word: i for i, (word, _) in enumerate(Counter(words).most_common(VOCAB - 1))}
    return torch.tensor([number.get(word, VOCAB - 1) for word in words])


def batch(tokens):
    """Inputs and labels [SEQUENCES, LENGTH] from random places of the text."""
    starts = torch.randint(len(tokens) - LENGTH, (SEQUENCES, 1), device=tokens.device)
    windows = tokens[starts + torch.arange(LENGTH + 1, device=tokens.device)]
    return windows[:, :-1], windows[:, 1:]


def train(name, model, loss_of, tokens, steps):
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, fused=True)
    for number in range(1, steps + 1):
        optimizer.zero_grad()
        loss = loss_of(*batch(tokens))
        loss.backward()
        optimizer.step()
        if number in (1, steps) or number % max(1, steps // 5) == 0:
            print(f"{name} step {number:>4}/{steps}   loss {loss.item():.3f}", flush=True)


@torch.no_grad()
def compare(when, student, teacher, inputs, labels, divergence):
    """Print how near the student is to the teacher, at temperature 1."""
    heads = student(inputs), student.head, teacher(inputs), teacher.head
    distance = linear_distillation(*heads, labels, divergence=divergence)
    choices = [(hidden @ head.t()).argmax(-1) for hidden, head in (heads[:2], heads[2:])]
    agreement = (choices[0] == choices[1]).float().mean()
    print(f"{when}: {divergence} {distance.item():.3f} nats, same choice for {agreement.item():.1%} of tokens")


def main():
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120, help="of each training (default: %(default)s)")
    divergences = ("forward_kl", "reverse_kl", "jsd")
    parser.add_argument("--divergence", choices=divergences, default="forward_kl", help="default: %(default)s")
    parser.add_argument("--temperature", type=float, default=2.0, help="softens both (default: %(default)s)")
    parser.add_argument(
        "--hard-label-weight", type=float, default=0.1, help="part of the labels, 0 to 1 (default: %(default)s)"
    )
    parser.add_argument("--device", choices=devices, default=devices[0], help="default: %(default)s")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="run the step eagerly")
    given = parser.parse_args()

    torch.manual_seed(0)
    tokens = text().to(given.device)
    training, held_out = tokens[:-HELD_OUT], batch(tokens[-HELD_OUT:])

    teacher, student = (Model(width).to(given.device) for width in (TEACHER_WIDTH, STUDENT_WIDTH))

    def teacher_loss(inputs, labels):
        return linear_cross_entropy(teacher(inputs), teacher.head, labels)

    @torch.compile(fullgraph=True, disable=not given.compile)
    def distilled(inputs, labels, teacher_hidden):
        return linear_distillation(
            student(inputs),
            student.head,
            teacher_hidden,
            teacher.head,
            labels,
            divergence=given.divergence,
            temperature=given.temperature,
            hard_label_weight=given.hard_label_weight,
        )

    def student_loss(inputs, labels):
        with torch.no_grad():
            teacher_hidden = teacher(inputs)
        return distilled(inputs, labels, teacher_hidden)

    train("teacher", teacher, teacher_loss, training, given.steps)
    teacher.requires_grad_(False)
    compare("before", student, teacher, *held_out, given.divergence)
    print("the student's step:", "compiling ..." if given.compile else "eager", flush=True)
    train("student", student, student_loss, training, given.steps)
    compare("after", student, teacher, *held_out, given.divergence)


if __name__ == "__main__":
    main()
