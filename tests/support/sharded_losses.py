"""Losses over ranks, and tensors for them: a new loss is one row. Their layouts are in sharded_layouts.

B sequences, S positions, H width, V vocabulary. Everything is fp64.
"""

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compiled_loss import Chunking, reference
from compiled_loss.engine.math.statistics import NAMES

B, S, H = 2, 6, 5
ROWS = Chunking(strategy="tokens", chunk_size=5)
COLUMNS = Chunking(strategy="vocab", chunk_size=3)


class Loss(NamedTuple):
    """A scalar of tensors, by the library or its reference, and whose gradients it has."""

    call: Callable[[ModuleType, dict[str, Tensor], dict[str, Any]], Tensor]
    wanted: tuple[str, ...]
    others: tuple[str, ...] = ("labels",)
    chunking: Chunking | None = None  # of losses that are chunked
    counted: bool = True  # by num_label_tokens, as data parallelism needs


def everything(t: dict[str, Tensor]) -> dict[str, Any]:
    own = {name: t[name] for name in ("mask", "token_weights", "class_weights")}
    return {**own, "label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 3.0, "temperature": 0.7, "shift": 1}


def counted(t: dict[str, Tensor]) -> dict[str, Any]:
    return {"reduction": "sum", "num_label_tokens": t["count"]}


def statistics(lib: ModuleType, t: dict[str, Tensor], more: dict[str, Any]) -> Tensor:
    wanted = NAMES
    rows = lib.linear_token_statistics(t["hidden"], t["weight"], t["labels"], bias=t["bias"], wanted=wanted, **more)
    sums = rows[0] * 0.3 + rows[1] * 0.2 - rows[2] * 0.7 + rows.log_sum_sq_probs * 0.4 * (1 + rows.first_argmax % 3)
    return sums.sum() / t["count"] + rows[3].sum() * 0


def a_few_classes(kept: bool) -> Loss:
    """Statistics over the classes that were kept, or log-probabilities of some beside the model's own top."""

    def call(lib: ModuleType, t: dict[str, Tensor], more: dict[str, Any]) -> Tensor:
        ids, temperature = t["top_indices"], t["token_weights"].detach() + 0.5
        few = {"kept_ids": ids} if kept else {"ids": ids, "top_k": 2}
        given = {"bias": t["bias"], "softcap": 3.0, "temperature": temperature, **few}
        rows = lib.linear_token_statistics(t["hidden"], t["weight"], t["labels"], **given, **more)
        if kept:
            return (rows.logprob - 0.3 * rows.entropy).sum() / t["count"]
        logprobs, chosen = rows.top_k
        return (rows.ids_logprob.exp().sum(-1) * (logprobs * (1 + chosen % 3)).sum(-1)).sum() / t["count"]

    return Loss(call, ("hidden", "weight", "bias"), ("labels", "top_indices", "token_weights"), COLUMNS)


def user_loss(statistics_: Any, old: Tensor, advantages: Tensor, clip: Any) -> Tensor:
    """Whatever a function can look at."""
    ratio = (statistics_.logprob - old).exp()
    losses = -torch.minimum(ratio * advantages, torch.clamp(ratio, 1 - clip, 1 + clip) * advantages)
    further = 1e-2 * statistics_.logsumexp.square() - 0.2 * statistics_.mean_logit * ~statistics_.correct
    further = further + 0.3 * statistics_.log_sum_sq_probs * (1 + statistics_.first_argmax % 3)
    return losses - 0.1 * statistics_.entropy + further


def own_loss(chunking: Chunking) -> Loss:
    """A loss of the user's, with inputs that want a gradient."""

    def call(lib: ModuleType, t: dict[str, Tensor], how: dict[str, Any]) -> Tensor:
        keywords = {"bias": t["bias"], "token_weights": t["token_weights"], "softcap": 3.0, **counted(t)}
        inputs = (t["old_logprob"], t["advantages"], torch.tensor(0.2, dtype=torch.float64))
        return lib.linear_token_loss(t["hidden"], t["weight"], t["labels"], user_loss, *inputs, **keywords, **how)

    wanted = ("hidden", "weight", "bias", "token_weights", "advantages")
    return Loss(call, wanted, ("labels", "old_logprob"), chunking)


def policy(importance: str) -> Loss:
    """A policy loss, its KL and its bonus."""
    options = {"importance": importance, "kl_coefficient": 0.3, "entropy_coefficient": 0.2}

    def call(lib: ModuleType, t: dict[str, Tensor], how: dict[str, Any]) -> Tensor:
        given = {"reference_logprob": t["old_logprob"] + 0.1, "token_weights": t["token_weights"], **options}
        if lib is not reference:
            inputs = (t["hidden"], t["weight"], t["labels"], t["old_logprob"], t["advantages"])
            return lib.linear_policy_loss(*inputs, **given, **how).loss
        logprob, _, entropy, *_ = lib.linear_token_statistics(t["hidden"], t["weight"], t["labels"])
        mask = t["labels"] != -100
        return lib.policy_loss(logprob, t["old_logprob"], t["advantages"], entropy=entropy, mask=mask, **given)

    others = ("labels", "old_logprob", "advantages", "token_weights")
    return Loss(call, ("hidden", "weight"), others, ROWS if importance == "token" else COLUMNS)


def preference(lib: ModuleType, t: dict[str, Tensor], how: dict[str, Any]) -> Tensor:
    """A pair, and a reference of its own head; the answers' own likelihood beside it."""
    options = {"kind": "robust", "label_smoothing": 0.1, "sft_coefficient": 0.3}
    given, theirs = (t["hidden"], t["weight"], t["labels"]), (t["teacher_hidden"], t["teacher_weight"])
    if lib is not reference:
        more = {"reference_hidden": theirs[0], "reference_weight": theirs[1], "bias": t["bias"], **how}
        return lib.linear_preference_loss(*given, mask=t["mask"], **more, **options).loss
    keywords = {"mask": t["mask"] != 0}
    logprob = lib.linear_token_statistics(*given, bias=t["bias"], **keywords)[0]
    compared = lib.linear_token_statistics(*theirs, t["labels"], **keywords)[0].detach()
    mask = (t["labels"] != -100) & (t["mask"] != 0)
    return lib.preference_loss(logprob, reference_logprob=compared, mask=mask, **options)


def kto(lib: ModuleType, t: dict[str, Tensor], how: dict[str, Any]) -> Tensor:
    """Packed answers of which tokens alternate."""
    desirable, kl = torch.tensor([True, False]), torch.tensor(0.2, dtype=torch.float64)
    given = (t["hidden"], t["weight"], t["labels"])
    if lib is not reference:
        return lib.linear_kto_loss(*given, desirable, segment_ids=t["segments"], kl=kl, **how).loss
    logprob, counts = lib.linear_token_statistics(*given)[0], t["labels"] != -100
    rows = [torch.stack([v.flatten(), v.flatten()]) for v in (logprob, counts)]
    own = t["segments"].flatten() == torch.arange(2).unsqueeze(1)
    return lib.kto_loss(rows[0], desirable, mask=rows[1] & own, kl=kl)


def with_statistics(lib: ModuleType, t: dict[str, Tensor], more: dict[str, Any]) -> Tensor:
    if lib is reference:
        return lib.linear_cross_entropy(t["hidden"], t["weight"], t["labels"], **counted(t))
    return lib.linear_cross_entropy_with_statistics(t["hidden"], t["weight"], t["labels"], **counted(t), **more).loss


def given_statistics(lib: ModuleType, t: dict[str, Tensor], more: dict[str, Any]) -> Tensor:
    keywords = {"mask": t["mask"], "softcap": 3.0, "shift": 1}
    rows = lib.token_statistics(t["logits"], t["labels"], **keywords, **more)
    return (rows[0] * 0.3 + rows[1] * 0.2 - rows[2] * 0.7).sum() / t["count"] + rows[3].sum() * 0


def classes_second(lib: ModuleType, t: dict[str, Tensor], more: dict[str, Any]) -> Tensor:
    return lib.cross_entropy(t["logits"].movedim(-1, 1), t["labels"], class_dim=1, **counted(t), **more)


def masked(lib: ModuleType, t: dict[str, Tensor], more: dict[str, Any]) -> Tensor:
    if lib is reference:
        return lib.cross_entropy(t["logits"], t["labels"], mask=t["mask"] != 0, **counted(t))
    return lib.masked_cross_entropy(t["logits"], t["labels"], t["mask"], num_label_tokens=t["count"], **more)


def linear(keywords: Callable[[dict[str, Tensor]], dict[str, Any]], chunking: Chunking, *more: str) -> Loss:
    wanted = ("hidden", "weight", *(name for name in more if name in ("bias", "token_weights")))
    others = ("labels", *(name for name in more if name not in wanted))
    return Loss(
        lambda lib, t, how: lib.linear_cross_entropy(t["hidden"], t["weight"], t["labels"], **keywords(t), **how),
        wanted,
        others,
        chunking,
    )


def distillation(divergence: Any, **keywords: Any) -> Loss:
    return Loss(
        lambda lib, t, how: lib.distillation(
            t["logits"], t["teacher_logits"], t["labels"], divergence=divergence, **keywords, **counted(t), **how
        ),
        ("logits",),
        ("teacher_logits", "labels"),
    )


def cached_teacher(divergence: Any, **keywords: Any) -> Loss:
    keywords["divergence"] = divergence

    def call(lib: ModuleType, t: dict[str, Tensor], how: dict[str, Any]) -> Tensor:
        top = {"teacher_topk": (t["top_values"], t["top_indices"]), **keywords, **counted(t), **how}
        return lib.distillation(t["logits"], None, t["labels"], **top)

    return Loss(call, ("logits",), ("top_values", "top_indices", "labels"))


def linear_cached_teacher(divergence: Any, **keywords: Any) -> Loss:
    keywords["divergence"] = divergence

    def call(lib: ModuleType, t: dict[str, Tensor], how: dict[str, Any]) -> Tensor:
        reduction = {} if "reduction" in keywords else counted(t)
        top = {"teacher_topk": (t["top_values"], t["top_indices"]), **keywords, **reduction, **how}
        loss = lib.linear_distillation(t["hidden"], t["weight"], None, None, t["labels"], **top)
        return loss.square().sum() if loss.dim() else loss

    return Loss(call, ("hidden", "weight"), ("top_values", "top_indices", "labels"), ROWS)


def linear_distillation(divergence: Any, **keywords: Any) -> Loss:
    def call(lib: ModuleType, t: dict[str, Tensor], how: dict[str, Any]) -> Tensor:
        tensors = (t["hidden"], t["weight"], t["teacher_hidden"], t["teacher_weight"], t["labels"])
        reduction = {} if "reduction" in keywords else counted(t)
        loss = lib.linear_distillation(*tensors, divergence=divergence, **keywords, **reduction, **how)
        return loss.square().sum() if loss.dim() else loss

    return Loss(call, ("hidden", "weight"), ("teacher_hidden", "teacher_weight", "labels"), ROWS)


def distillation_of_probabilities(divergence: Any, **keywords: Any) -> Loss:
    keywords["divergence"] = divergence

    def call(lib: ModuleType, t: dict[str, Tensor], how: dict[str, Any]) -> Tensor:
        own = {"teacher_probabilities": t["target_probs"], **keywords, **counted(t), **how}
        return lib.linear_distillation(t["hidden"], t["weight"], None, None, t["labels"], **own)

    return Loss(call, ("hidden", "weight"), ("target_probs", "labels"), ROWS)


def distillation_statistics(teacher: str, **keywords: Any) -> Loss:
    """The loss and all that is known of each token, in one number."""

    def call(lib: ModuleType, t: dict[str, Tensor], how: dict[str, Any]) -> Tensor:
        top = {"teacher_topk": (t["top_values"], t["top_indices"])} if teacher == "top" else {}
        target = None if top else t["teacher_logits"]
        if lib is not reference:
            more = {**top, **keywords, **counted(t), **how}
            loss, statistics = lib.distillation_with_statistics(t["logits"], target, t["labels"], **more)
            return loss + sum(v.sum() for v in statistics[1:] if v is not None) / t["count"]
        loss = lib.distillation(t["logits"], target, t["labels"], **top, **keywords, **counted(t))
        rows = lib.distillation_statistics(t["logits"], target, **top).values()
        return loss + sum(v[t["labels"] != -100].sum().detach() for v in rows) / t["count"]

    return Loss(call, ("logits",), ("teacher_logits", "top_values", "top_indices", "labels"))


def soft(target: tuple[str, ...], **keywords: Any) -> Loss:
    def call(lib: ModuleType, t: dict[str, Tensor], how: dict[str, Any]) -> Tensor:
        own = {name.removeprefix("whole_"): t[name] for name in target}
        return lib.linear_soft_cross_entropy(
            t["hidden"], t["weight"], t["position_mask"], **own, **counted(t), **keywords, **how
        )

    wanted = tuple(name for name in target if name in ("bias", "token_weights"))
    others = tuple(name for name in target if name not in wanted)
    return Loss(call, ("hidden", "weight", *wanted), (*others, "position_mask"), ROWS)


def capped_distillation(divergence: str, teacher: str, **keywords: Any) -> Loss:
    """With all that heads and tokens may have, on logits, on heads or beside a cached teacher."""
    keywords |= {**CAPS, "divergence": divergence, "shift": 1, "temperature": 1.5, "hard_label_weight": 0.3}

    def call(lib: ModuleType, t: dict[str, Tensor], how: dict[str, Any]) -> Tensor:
        own = {**keywords, "mask": t["mask"], "token_weights": t["token_weights"]}
        own |= {} if "reduction" in keywords else counted(t)
        if teacher == "logits":
            return lib.distillation(t["logits"], t["teacher_logits"], t["labels"], **TEACHER_CAPS, **own, **how)
        own["bias"] = t["bias"]
        if teacher == "top":
            given, own["teacher_topk"] = (None, None), (t["top_values"], t["top_indices"])
        else:
            given, own["teacher_bias"] = (t["teacher_hidden"], t["teacher_weight"]), t["teacher_bias"]
            own |= TEACHER_CAPS
        loss = lib.linear_distillation(t["hidden"], t["weight"], *given, t["labels"], **own, **how)
        return loss.square().sum() if loss.dim() else loss

    tensors = {
        "logits": (("logits", "token_weights"), ("teacher_logits",)),
        "top": (("hidden", "weight", "bias", "token_weights"), ("top_values", "top_indices")),
        "head": (("hidden", "weight", "bias", "token_weights"), ("teacher_hidden", "teacher_weight", "teacher_bias")),
    }
    wanted, others = tensors[teacher]
    return Loss(call, wanted, (*others, "labels", "mask"), None if teacher == "logits" else ROWS)


CAPS = {"softcap": 3.0, "logit_scale": 0.7}
TEACHER_CAPS = {"teacher_softcap": 2.0, "teacher_logit_scale": 1.3}


def forbidden(chunking: Chunking) -> Loss:
    """A bias that leaves some ranks no class."""

    def call(lib: ModuleType, t: dict[str, Tensor], how: dict[str, Any]) -> Tensor:
        return lib.linear_cross_entropy(
            t["hidden"], t["weight"], t["allowed"], bias=t["forbidding"], **counted(t), **how
        )

    return Loss(call, ("hidden", "weight"), ("allowed", "forbidding"), chunking)


LOSSES = {
    "linear_cross_entropy, tokens": linear(counted, ROWS),
    "linear_cross_entropy, vocab": linear(counted, COLUMNS),
    "everything, tokens": linear(
        lambda t: {**everything(t), **counted(t), "bias": t["bias"]},
        ROWS,
        "bias",
        "token_weights",
        "mask",
        "class_weights",
    ),
    "everything, vocab": linear(
        lambda t: {**everything(t), **counted(t), "bias": t["bias"]},
        COLUMNS,
        "bias",
        "token_weights",
        "mask",
        "class_weights",
    ),
    "forbidden classes, tokens": forbidden(ROWS),
    "forbidden classes, vocab": forbidden(COLUMNS),
    "compacted": linear(counted, replace(ROWS, max_label_tokens=9)),  # of 12 tokens, 3 of which are masked
    "mean": linear(lambda t: {"label_smoothing": 0.2}, Chunking())._replace(counted=False),
    "none": Loss(
        lambda lib, t, how: (
            lib.linear_cross_entropy(t["hidden"], t["weight"], t["labels"], reduction="none", **how).square().sum()
        ),
        ("hidden", "weight"),
        chunking=COLUMNS,
    ),
    "linear_token_loss, tokens": own_loss(ROWS),
    "linear_token_loss, vocab": own_loss(COLUMNS),
    "linear_policy_loss, token": policy("token"),
    "linear_policy_loss, sequence": policy("sequence"),
    "linear_preference_loss": Loss(
        preference,
        ("hidden", "weight", "bias"),
        ("labels", "mask", "teacher_hidden", "teacher_weight"),
        COLUMNS,
        counted=False,
    ),
    "linear_kto_loss": Loss(kto, ("hidden", "weight"), ("labels", "segments"), COLUMNS, counted=False),
    "linear_token_statistics": Loss(statistics, ("hidden", "weight", "bias"), chunking=COLUMNS),
    "linear_token_statistics, kept": a_few_classes(kept=True),
    "linear_token_statistics, ids and top": a_few_classes(kept=False),
    "linear_cross_entropy_with_statistics": Loss(with_statistics, ("hidden", "weight"), chunking=ROWS),
    "cross_entropy": Loss(
        lambda lib, t, how: lib.cross_entropy(t["logits"], t["labels"], **counted(t), **how), ("logits",)
    ),
    "cross_entropy, everything": Loss(
        lambda lib, t, how: lib.cross_entropy(t["logits"], t["labels"], **everything(t), **counted(t), **how),
        ("logits", "token_weights"),
        ("labels", "mask", "class_weights"),
    ),
    "cross_entropy, class_dim": Loss(classes_second, ("logits",)),
    "cross_entropy, probabilities": Loss(
        lambda lib, t, how: lib.cross_entropy(t["logits"], t["target_probs"], **everything(t), **counted(t), **how),
        ("logits", "target_probs", "token_weights"),
        ("mask", "class_weights"),
    ),
    "token_statistics": Loss(given_statistics, ("logits",), ("labels", "mask")),
    "masked_cross_entropy": Loss(masked, ("logits",), ("labels", "mask")),
    "distillation, forward_kl": distillation("forward_kl", temperature=2.0),
    "distillation, reverse_kl": distillation("reverse_kl", hard_label_weight=0.3),
    "distillation, jsd": distillation("jsd", jsd_weight=0.3, temperature=0.7, hard_label_weight=0.4),
    "linear_distillation, forward_kl": linear_distillation("forward_kl", temperature=2.0),
    "linear_distillation, reverse_kl": linear_distillation("reverse_kl", hard_label_weight=0.3),
    "linear_distillation, jsd": linear_distillation("jsd", jsd_weight=0.3, temperature=0.7, hard_label_weight=0.4),
    "linear_distillation, none": linear_distillation("forward_kl", reduction="none", hard_label_weight=0.2),
    "distillation, mixture": distillation({"acceptance": 0.6, "forward_kl": 0.4}, hard_label_weight=0.3),
    "linear_distillation, lk": linear_distillation("lk", temperature=1.5),
    "linear_distillation, acceptance, none": linear_distillation("acceptance", reduction="none"),
    "linear_distillation, cached teacher, mixture": linear_cached_teacher({"total_variation": 0.6, "acceptance": 0.4}),
    "linear_distillation, probabilities": distillation_of_probabilities({"jsd": 0.5, "lk": 0.4}, temperature=1.5),
    "distillation_with_statistics": distillation_statistics("whole", divergence="acceptance"),
    "distillation_with_statistics, cached teacher": distillation_statistics("top", divergence="lk"),
    "distillation, cached teacher": cached_teacher("jsd", temperature=1.5, hard_label_weight=0.3),
    "linear_distillation, cached teacher": linear_cached_teacher("jsd", temperature=1.5, hard_label_weight=0.3),
    "linear_distillation, cached teacher, none": linear_cached_teacher("reverse_kl", reduction="none"),
    "masked_soft_cross_entropy": Loss(
        lambda lib, t, how: lib.masked_soft_cross_entropy(t["logits"], t["target_probs"], t["position_mask"], **how),
        ("logits", "target_probs"),
        ("position_mask",),
        counted=False,
    ),
    "linear_soft_cross_entropy, probabilities": soft(("target_probs",)),
    "linear_soft_cross_entropy, teacher": soft(("teacher_hidden", "teacher_weight"), temperature=1.5),
    "linear_soft_cross_entropy, draft_to_target": soft(("teacher_hidden", "whole_teacher_weight", "draft_to_target")),
    "distillation, everything": capped_distillation("jsd", "logits"),
    "linear_distillation, everything": capped_distillation("reverse_kl", "head"),
    "linear_distillation, everything, none": capped_distillation("jsd", "head", reduction="none"),
    "linear_distillation, cached teacher, everything": capped_distillation("forward_kl", "top"),
    "masked_soft_cross_entropy, everything": Loss(
        lambda lib, t, how: lib.masked_soft_cross_entropy(
            t["logits"],
            t["target_probs"],
            t["position_mask"],
            token_weights=t["token_weights"],
            temperature=0.7,
            **CAPS,
            **counted(t),
            **how,
        ),
        ("logits", "target_probs", "token_weights"),
        ("position_mask",),
    ),
    "linear_soft_cross_entropy, everything": soft(
        ("teacher_hidden", "teacher_weight", "teacher_bias", "bias", "token_weights"), **CAPS, **TEACHER_CAPS
    ),
    "linear_soft_cross_entropy, draft_to_target, everything": soft(
        ("teacher_hidden", "whole_teacher_weight", "whole_teacher_bias", "draft_to_target", "bias"), **TEACHER_CAPS
    ),
    "multi_token_prediction": Loss(
        lambda lib, t, how: lib.multi_token_prediction(
            [t["hidden"], t["further"]],
            t["weight"],
            t["labels"],
            mask=t["mask"],
            num_label_tokens=t["count"],
            softcap=3.0,
            **how,
        ),
        ("hidden", "further", "weight"),
        ("labels", "mask"),
        chunking=ROWS,
    ),
}


def problem(vocab: int, seed: int = 0) -> dict[str, Tensor]:
    """All tensors of all losses, whole."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    labels = torch.randint(0, vocab, (B, S), generator=random)
    labels[0, 1] = labels[1, -2:] = -100
    top = normal(B, S, vocab).log_softmax(-1).topk(min(5, vocab))
    return {
        "hidden": normal(B, S, H),
        "further": normal(B, S, H),
        "weight": normal(vocab, H),
        "bias": normal(vocab),
        "forbidding": torch.where(torch.arange(vocab) < 2, normal(vocab), float("-inf")),
        "labels": labels,
        "allowed": torch.where(labels < 0, labels, labels % 2),
        "mask": torch.randint(0, 3, (B, S), generator=random),
        "token_weights": normal(B, S).abs(),
        "class_weights": normal(vocab).abs(),
        "position_mask": torch.randint(0, 3, (B, S, 1), generator=random),
        "logits": normal(B, S, vocab),
        "teacher_logits": normal(B, S, vocab),
        "target_probs": normal(B, S, vocab).softmax(-1),
        "top_values": top.values,
        "top_indices": top.indices,
        "teacher_hidden": normal(B, S, H + 2),
        "teacher_weight": normal(vocab, H + 2),
        "teacher_bias": normal(vocab),
        "whole_teacher_weight": normal(2 * vocab, H + 2),
        "whole_teacher_bias": normal(2 * vocab),
        "draft_to_target": torch.randperm(2 * vocab, generator=random)[:vocab],
        "segments": torch.arange(B * S).view(B, S) % 2,
        "count": torch.tensor(7),
        "old_logprob": -3 + 0.3 * normal(B, S),
        "advantages": normal(B, S),
    }
