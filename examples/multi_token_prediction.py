"""Multi-token prediction as in DeepSeek-V3, on packed sequences: one head for the main loss and for every depth.

Depth k, from 0, predicts k + 2 tokens ahead, from the depth before it and the token revealed since. Several documents
share a row, so the label k + 1 further on may belong to the next document: `seq_idx` says which document each token is
in, and such labels are ignored.

    loss = linear_cross_entropy(hidden, weight, labels)
    auxiliary = multi_token_losses(hidden_per_depth, weight, labels, seq_idx=seq_idx, scaling_factor=0.3)
    (loss + auxiliary.loss).backward()           # auxiliary.per_depth: each depth's own mean, detached

The depths go through the head together, and no logits [tokens, vocabulary] are held. A compiled step takes `seq_idx`
rather than `cu_seqlens`: its shape does not change with the number of documents.

The text is the sources of Python's standard library, a document one of its paragraphs. All losses fall together: each
depth is one token further ahead, and has been shown one more.

    python examples/multi_token_prediction.py
"""

import argparse
import re
from collections import Counter

import torch
from torch import nn

from compiled_loss import linear_cross_entropy, multi_token_losses, multi_token_targets
from compiled_loss.demo.text import sources  # of the standard library: text that every machine has

VOCAB, WIDTH, HEADS, LENGTH, ROWS, DEPTHS = 2048, 128, 2, 128, 8, 2


def block():
    return nn.TransformerEncoderLayer(
        WIDTH, HEADS, 4 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True, bias=False
    )


class Depth(nn.Module):
    """The hidden states of the depth before, and embeddings of the tokens revealed since, to hidden states."""

    def __init__(self):
        super().__init__()
        self.hidden_norm, self.token_norm, self.norm = (nn.RMSNorm(WIDTH) for _ in range(3))
        self.project = nn.Linear(2 * WIDTH, WIDTH, bias=False)
        self.block = block()

    def forward(self, hidden, revealed, mask):
        hidden = self.project(torch.cat((self.hidden_norm(hidden), self.token_norm(revealed)), -1))
        return self.norm(self.block(hidden, mask))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)  # its weight is every head's as well
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.position = nn.Parameter(torch.zeros(LENGTH, WIDTH))
        self.block = block()
        self.norm = nn.RMSNorm(WIDTH)
        self.depths = nn.ModuleList(Depth() for _ in range(DEPTHS))

    def forward(self, tokens, seq_idx):
        """Hidden states [B, S, WIDTH] of the main head, and a list of each depth's."""
        earlier = torch.ones(LENGTH, LENGTH, dtype=torch.bool, device=tokens.device).tril()
        seen = earlier & (seq_idx.unsqueeze(-1) == seq_idx.unsqueeze(-2))
        mask = ~seen.repeat_interleave(HEADS, 0)  # True hides: later tokens, and other documents
        embedded = self.embedding(tokens)
        hidden = states = self.norm(self.block(embedded + self.position, mask))
        per_depth = []
        for k, depth in enumerate(self.depths):
            states = depth(states, embedded.roll(-k - 1, 1), mask)  # what wraps around has no label
            per_depth.append(states)
        return hidden, per_depth


def packed():
    """The standard library's words as tokens [T], rare words sharing the last; and the paragraph of each [T]."""
    texts = [text for text in "\n".join(sources(1_000_000)).split("\n\n") if text.strip()]
    texts = [re.findall(r"\w+|\n\s*|[^\w\s]", text) for text in texts]
    common = Counter(word for text in texts for word in text).most_common(VOCAB - 1)
    number = {word: i for i, (word, _) in enumerate(common)}
    tokens = torch.tensor([number.get(word, VOCAB - 1) for text in texts for word in text])
    return tokens, torch.repeat_interleave(torch.tensor([len(text) for text in texts]))


def main():
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="of the optimizer (default: %(default)s)")
    parser.add_argument("--device", choices=devices, default=devices[0], help="default: %(default)s")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="run the step eagerly")
    given = parser.parse_args()

    torch.manual_seed(0)
    text, document = (values.to(given.device) for values in packed())
    model = Model().to(given.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, fused=True)

    @torch.compile(fullgraph=True, disable=not given.compile)
    def losses(tokens, seq_idx):
        """What is trained; and to look at, the main loss and each depth's."""
        labels = multi_token_targets(tokens, 0, seq_idx=seq_idx)  # the next token, unless its document is another
        hidden, per_depth = model(tokens, seq_idx)
        weight = model.embedding.weight
        main = linear_cross_entropy(hidden, weight, labels)
        auxiliary = multi_token_losses(per_depth, weight, labels, seq_idx=seq_idx, scaling_factor=0.3)
        return main + auxiliary.loss, main.detach(), auxiliary.per_depth

    for number in range(1, given.steps + 1):
        starts = torch.randint(len(text) - LENGTH, (ROWS, 1), device=given.device)
        places = starts + torch.arange(LENGTH, device=given.device)
        tokens, seq_idx = text[places], document[places]
        if number == 1:
            counts = [(multi_token_targets(tokens, k, seq_idx=seq_idx) != -100).sum().item() for k in range(DEPTHS + 1)]
            print(f"{ROWS} rows of {LENGTH} tokens, {document[places].unique().numel()} documents; labels within them:")
            print(f"    main {counts[0]}" + "".join(f", depth {k} {count}" for k, count in enumerate(counts[1:])))
            print("the step:", "compiling ..." if given.compile else "eager", flush=True)
        optimizer.zero_grad()
        loss, main_loss, per_depth = losses(tokens, seq_idx)
        loss.backward()
        optimizer.step()
        if number in (1, given.steps) or number % max(1, given.steps // 10) == 0:
            depths = "".join(f"   depth {k} {value:.3f}" for k, value in enumerate(per_depth.tolist()))
            print(f"step {number:>4}/{given.steps}   main {main_loss.item():.3f}{depths}", flush=True)


if __name__ == "__main__":
    main()
