"""Gradient accumulation whose gradients are those of the whole batch, however long its sequences are.

A small transformer learns to complete paragraphs of Python's standard library. They differ in length, and their first
line is a prompt, which has no labels. So microbatches differ in how many tokens they train on, and the mean of their
means is not the mean of the batch. Count the whole batch's label tokens first, and divide every sum by that count:

    num_label_tokens = sum((labels != -100).sum() for _, labels in microbatches)
    for inputs, labels in microbatches:
        loss = linear_cross_entropy(model(inputs), weight, labels, reduction="sum", num_label_tokens=num_label_tokens)
        loss.backward()

The count may be a tensor: nothing waits for the device, and nothing is compiled again when it changes. Under data
parallelism sum the count over the ranks, and sum the gradients instead of averaging them.

    python examples/gradient_accumulation.py
"""

import argparse
import re
from collections import Counter

import torch
from torch import nn

from compiled_loss import linear_cross_entropy
from compiled_loss.demo.text import sources  # of the standard library: text that every machine has

VOCAB, WIDTH, LENGTH = 2048, 128, 64
MICROBATCHES, SEQUENCES = 8, 4  # a step's, a microbatch's


class Block(nn.TransformerEncoderLayer):
    def __init__(self):
        # Smooth: the kink of a ReLU would make of a rounding error a difference of gradients.
        super().__init__(WIDTH, 2, 4 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True, bias=False)

    def forward(self, hidden):
        mask = nn.Transformer.generate_square_subsequent_mask(hidden.shape[1], device=hidden.device)
        return super().forward(hidden, mask, is_causal=True)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)  # its weight is the head's as well
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.position = nn.Parameter(torch.zeros(LENGTH, WIDTH))
        self.block = Block()
        self.norm = nn.RMSNorm(WIDTH)

    def forward(self, inputs, labels, **normalisation):
        hidden = self.embedding(inputs) + self.position
        hidden = self.norm(self.block(hidden))
        return linear_cross_entropy(hidden, self.embedding.weight, labels, **normalisation)


def paragraphs():
    """Inputs and labels [paragraphs, LENGTH]; labels are -100 in the prompt and after the end."""
    texts = [text.strip() for text in "\n".join(sources(1_000_000)).split("\n\n") if "\n" in text.strip()]
    texts = [re.findall(r"\w+|\n\s*|[^\w\s]", text) for text in texts]
    common = Counter(word for text in texts for word in text).most_common(VOCAB - 1)
    number = {word: i for i, (word, _) in enumerate(common)}  # rarer words share the last
    inputs = torch.zeros(len(texts), LENGTH, dtype=torch.int64)
    labels = torch.full((len(texts), LENGTH), -100)
    for row, text in enumerate(texts):
        tokens = torch.tensor([number.get(word, VOCAB - 1) for word in text[: LENGTH + 1]])
        prompt = next(i for i, word in enumerate(text) if "\n" in word)  # where its line ends
        inputs[row, : len(tokens) - 1] = tokens[:-1]
        labels[row, prompt : len(tokens) - 1] = tokens[prompt + 1 :]
    return inputs, labels


def accumulate(loss_of, microbatches):
    """Add the gradients of the mean over all label tokens of the microbatches; that mean, as a tensor."""
    num_label_tokens = sum((labels != -100).sum() for _, labels in microbatches)
    total = 0.0
    for inputs, labels in microbatches:
        loss = loss_of(inputs, labels, reduction="sum", num_label_tokens=num_label_tokens)
        loss.backward()
        total += loss.detach()
    return total


def mean_of_means(loss_of, microbatches):
    """Weigh microbatches alike, as if each had as many label tokens: what not to do."""
    for inputs, labels in microbatches:
        (loss_of(inputs, labels) / len(microbatches)).backward()


def gradients(model, method, loss_of, microbatches):
    model.zero_grad()
    method(loss_of, microbatches)
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def compare(model, step, microbatches):
    """Print how far accumulated gradients are from those of the batch in one piece."""
    counts = [(labels != -100).sum().item() for _, labels in microbatches]
    whole = gradients(model, mean_of_means, model, [tuple(map(torch.cat, zip(*microbatches, strict=True)))])
    ours = gradients(model, accumulate, step, microbatches)
    naive = gradients(model, mean_of_means, model, microbatches)
    exact, wrong = (((found - whole).norm() / whole.norm()).item() for found in (ours, naive))
    print(f"label tokens of the microbatches: {', '.join(map(str, counts))}")
    print("their gradients' relative distance from those of the whole batch:")
    print(f"    sums / num_label_tokens   {exact:.1e}")
    print(f"    mean of means             {wrong:.1e}")
    assert exact < 1e-5, "more than the rounding of fp32 sums in another order"


def main():
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="of the optimizer (default: %(default)s)")
    parser.add_argument("--device", choices=devices, default=devices[0], help="default: %(default)s")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="run the step eagerly")
    given = parser.parse_args()

    torch.manual_seed(0)
    inputs, labels = (values.to(given.device) for values in paragraphs())
    model = Model().to(given.device)
    step = torch.compile(model, fullgraph=True, disable=not given.compile)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, fused=True)
    print(f"{len(inputs)} paragraphs; a step is {MICROBATCHES} microbatches of {SEQUENCES}")
    print("the step:", "compiling ..." if given.compile else "eager", flush=True)

    for number in range(1, given.steps + 1):
        chosen = torch.randint(len(inputs), (MICROBATCHES, SEQUENCES), device=given.device)
        microbatches = [(inputs[rows], labels[rows]) for rows in chosen]
        if number == 1:
            compare(model, step, microbatches)
        optimizer.zero_grad()
        loss = accumulate(step, microbatches)
        optimizer.step()
        if number in (1, given.steps) or number % max(1, given.steps // 10) == 0:
            print(f"step {number:>4}/{given.steps}   loss {loss.item():.3f}", flush=True)


if __name__ == "__main__":
    main()
