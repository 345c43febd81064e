"""Distillation's keywords and shapes, and inputs of losses of two distributions."""

import torch

from compiled_loss import Chunking

CHUNKS = Chunking(chunk_size=4)
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "total_variation", "acceptance", "lk")
KEYWORDS = {
    "plain": {},
    "temperature": {"temperature": 2.5},
    "hard labels": {"hard_label_weight": 0.3},
    "hard labels alone": {"hard_label_weight": 1.0},
    "everything": {"temperature": 0.6, "hard_label_weight": 0.3, "jsd_weight": 0.2, "ignore_index": 1},
    "sum": {"reduction": "sum"},
    "count": {"reduction": "sum", "num_label_tokens": 7, "hard_label_weight": 0.5},
    "no count": {"reduction": "sum", "num_label_tokens": torch.tensor(0)},
}
EACH = {"reduction": "none", "hard_label_weight": 0.4}
SHAPES = [((3, 5), 4, 6, 13), ((11,), 7, 3, 29), ((1, 1), 3, 2, 1), ((2, 1, 3), 1, 1, 2)]


def heads(shape, width, teacher_width, vocab, dtype=torch.float64, ignore_index=-100, scale=2.0):
    """Student's and teacher's hidden states and weights, labels of which some are ignored."""
    hidden = scale * torch.randn(*shape, width, dtype=torch.float64)
    weight = torch.randn(vocab, width, dtype=torch.float64)
    teacher = scale * torch.randn(*shape, teacher_width, dtype=torch.float64)
    teacher_weight = torch.randn(vocab, teacher_width, dtype=torch.float64)
    labels = torch.randint(0, vocab, shape)
    labels = torch.where(torch.rand(shape) < 0.3, ignore_index, labels)
    tensors = [v.to(dtype) for v in (hidden, weight, teacher, teacher_weight)]
    return [v.requires_grad_(i < 2) for i, v in enumerate(tensors)], labels


STUDENT = {"softcap": 2.0, "logit_scale": 0.7}
TEACHER = {"teacher_softcap": 3.0, "teacher_logit_scale": 1.4}
TARGETS = ["target_probs", "teacher", "draft vocabulary"]


def soft_targets(name, shape, vocab, width, dtype=torch.float64):
    if name == "target_probs":
        return {"target_probs": torch.randn(*shape, vocab, dtype=torch.float64).softmax(-1).to(dtype)}
    rows = 3 * vocab if name == "draft vocabulary" else vocab
    found = {
        "teacher_hidden": 2 * torch.randn(*shape, width, dtype=torch.float64).to(dtype),
        "teacher_weight": torch.randn(rows, width, dtype=torch.float64).to(dtype),
    }
    if name == "draft vocabulary":
        found["draft_to_target"] = torch.randperm(rows)[:vocab]
    return found


def cached(teacher, teacher_weight, k, temperature=1.0, dtype=None):
    """The top of the teacher's distribution, in no order."""
    log_p = (teacher.double() @ teacher_weight.double().t() / temperature).log_softmax(-1)
    k = min(k, log_p.shape[-1])
    values, indices = log_p.topk(k)
    order = torch.randperm(k)
    return values[..., order].to(dtype or teacher.dtype), indices[..., order]


def biases(vocab, dtype=torch.float64):
    random = [torch.randn(vocab, dtype=torch.float64).to(dtype) for _ in range(2)]
    return {"bias": random[0].requires_grad_(), "teacher_bias": random[1]}
