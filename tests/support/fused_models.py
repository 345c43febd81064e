"""A model like those of `transformers`, with what stands between its head and its loss."""

import torch
from torch.nn import functional as F

B, S, H, V = 2, 7, 6, 11


class Model(torch.nn.Module):
    """As those of transformers: `finish(model, logits, labels)` is what stands between head and loss."""

    def __init__(self, finish, bias=False):
        super().__init__()
        torch.manual_seed(0)
        self.finish = finish
        self.embedding = torch.nn.Embedding(V, H, dtype=torch.float64)
        self.lm_head = torch.nn.Linear(H, V, bias=bias, dtype=torch.float64)
        self.register_buffer("final_logits_bias", torch.randn(1, V, dtype=torch.float64))
        with torch.no_grad():
            self.lm_head.weight.mul_(5)

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids, labels=None):
        logits = self.lm_head(self.embedding(input_ids))
        loss = None if labels is None else self.finish(self, logits, labels)
        return {"loss": loss, "logits": logits}


def batch():
    ids = torch.randint(0, V, (B, S), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, :3] = -100
    return ids, labels


def step(model):
    ids, labels = batch()
    model.zero_grad()
    output = model(ids, labels=labels)
    output["loss"].backward()
    return output, [parameter.grad.clone() for parameter in model.parameters()]


def aligned(logits, labels, **options):
    return F.cross_entropy(logits.contiguous().view(-1, logits.shape[-1]), labels.view(-1), **options)


def causal(model, logits, labels):
    """As ForCausalLMLoss."""
    labels = F.pad(labels, (0, 1), value=-100)[..., 1:].contiguous()
    return aligned(logits.to(torch.float64), labels.to(logits.device), reduction="sum") / torch.tensor(9)


def shifted(model, logits, labels):
    """As classes with a loss of their own."""
    shift_logits, shift_labels = logits[..., :-1, :].contiguous(), labels[..., 1:].contiguous()
    return torch.nn.CrossEntropyLoss()(shift_logits.view(-1, V), shift_labels.view(-1))


def z_loss(model, logits, labels):
    """As Bamba's, and another way to say it."""
    squares = torch.logsumexp(logits * 2, dim=-1).square().mean() + logits.logsumexp(-1, keepdim=True).mean()
    return aligned(logits, labels) + 0.1 * squares


def label_smoother(model, logits, labels):
    """As the Trainer's."""
    log_probs, ignored = -F.log_softmax(logits, dim=-1), (labels == -100).unsqueeze(-1)
    chosen = log_probs.gather(dim=-1, index=labels.clamp(min=0).unsqueeze(-1))
    total = log_probs.sum(dim=-1, keepdim=True, dtype=torch.float64)
    chosen.masked_fill_(ignored, 0.0)
    total.masked_fill_(ignored, 0.0)
    return chosen.sum() * 0.7 + total.sum() * 0.3 / log_probs.shape[-1] + torch.log_softmax(logits, -1).sum(-1).mean()


class Outer(torch.nn.Module):
    """As models that see: the head is another's, around which this computes a loss."""

    def __init__(self, *models):
        super().__init__()
        self.models = torch.nn.ModuleList(models)

    def get_output_embeddings(self):
        return None

    def forward(self, ids, labels=None):
        logits = self.models[0](ids)["logits"]
        return {"loss": causal(self, logits, labels), "logits": logits}
