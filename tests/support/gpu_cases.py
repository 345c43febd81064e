"""Calls whose GPU code is held to account: every public function, each strategy, the keywords that change kernels."""

import functools
from dataclasses import dataclass, field, replace

import naive
import torch

import compiled_loss
from compiled_loss import Chunking
from compiled_loss.engine.math.statistics import NAMES
from compiled_loss.planner.plan import MIN_ROWS

SHAPES = {"8B": (8192, 4096, 131072), "Gemma": (8192, 2304, 256000), "N < H": (2048, 4096, 131072)}


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def keywords(tokens, vocab):
    """name: keywords that change the kernels of a linear loss. "bias" is an input, with a gradient."""
    return {
        "plain": {},
        "bias": {"bias": True},
        "softcap": {"softcap": 30.0},
        "smoothing": {"label_smoothing": 0.1},
        "z-loss": {"z_loss": 1e-4},
        "class weights": {"class_weights": meta(vocab), "label_smoothing": 0.1},
        "mask": {"mask": meta(tokens, dtype=torch.bool), "token_weights": meta(tokens)},
        "everything": {
            "bias": True,
            "softcap": 30.0,
            "temperature": 0.7,
            "label_smoothing": 0.1,
            "z_loss": 1e-4,
            "class_weights": meta(vocab),
            "mask": meta(tokens, dtype=torch.bool),
            "token_weights": meta(tokens),
        },
    }


@dataclass(frozen=True)
class Case:
    """A call, and what must be true of its code. Sizes in bytes; operations in units of 2 N H V."""

    call: functools.partial
    inputs: tuple[str, ...]
    outputs: int  # the gradients, in the dtypes they are summed in
    chunk: int
    chunks: int = 1
    forward: float = 0  # operations
    backward: float = 0
    keeps: int = 0  # between forward and backward, besides O(N)
    generated: tuple[int, int] = (0, 0)  # kernels a chunk, forward and backward
    options: dict = field(default_factory=dict)  # of inspect


def linear(strategy, shape, chunks=None, *, function="linear_cross_entropy", grad="hw", size=None, **options):
    """A linear loss in `chunks` even chunks, 4 unless given, or of `size`; `grad`: whose gradients are wanted."""
    tokens, width, vocab = shape
    chunks = chunks or min(4, tokens // MIN_ROWS)
    rows = size or (tokens if strategy == "tokens" else vocab) // chunks
    bias = options.pop("bias", False)
    inputs = [f"bf16[{tokens},{width}]", f"bf16[{vocab},{width}]", f"int64[{tokens}]:0..{vocab - 1}"]
    inputs[0] += ":grad" if "h" in grad else ""
    inputs[1] += ":grad" if "w" in grad else ""
    chunking = Chunking(strategy=strategy, chunk_size=rows, accumulate_dtype=torch.bfloat16)
    call = functools.partial(getattr(compiled_loss, function), chunking=chunking, **options)
    if bias:
        call = functools.partial(with_bias, getattr(compiled_loss, function), chunking=chunking, **options)
        inputs.append(f"bf16[{vocab}]:grad")
    outputs = 2 * (("h" in grad) * tokens * width + ("w" in grad) * vocab * width) + 4 * bias * vocab
    return Case(
        call,
        tuple(inputs),
        outputs=outputs,
        chunk=2 * rows * (vocab if strategy == "tokens" else tokens),
        chunks=chunks,
        forward=1 if strategy == "vocab" else 1 + len(grad),
        backward=0 if strategy == "tokens" or not grad else 1 + len(grad),
        keeps=outputs if strategy == "tokens" else 0,
        generated=(1, 0) if strategy == "tokens" else (1, 1),
        options={} if grad else {"backward": False},
    )


def with_bias(function, hidden, weight, labels, bias, **options):
    return function(hidden, weight, labels, bias=bias, **options)


def with_temperature(function, hidden, weight, labels, temperature, **options):
    return function(hidden, weight, labels, temperature=temperature, **options)


def of_temperatures(strategy, shape, **options):
    """With a temperature a token."""
    case = linear(strategy, shape, **options)
    call = functools.partial(with_temperature, case.call.func, **case.call.keywords)
    return replace(case, call=call, inputs=(*case.inputs, f"fp32[{shape[0]}]"))


def clipped(statistics, old_logprob, advantage, low, high):
    """A clipped policy gradient."""
    ratio = (statistics.logprob - old_logprob).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def clipped_with_entropy(statistics, old_logprob, advantage, low, high):
    """The same with a bonus."""
    ratio = (statistics.logprob - old_logprob).exp()
    clipped = torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)
    return -clipped - 0.01 * statistics.entropy


def of_everything(statistics, old_logprob, advantage, low, high):
    """Whatever a loss can look at."""
    ratio = (statistics.logprob - old_logprob).exp()
    losses = -torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage) - 0.01 * statistics.entropy
    return losses + 1e-4 * statistics.logsumexp.square() - 0.1 * statistics.mean_logit * statistics.correct


def of_further_statistics(statistics, old_logprob, advantage, low, high):
    """What a policy gradient's control variate looks at: 1 - 2 p + sum(p^2), where the largest is not the label."""
    ratio = (statistics.logprob - old_logprob).exp().clamp(1 - low, 1 + high)
    norm = 1 - 2 * statistics.logprob.exp() + statistics.log_sum_sq_probs.exp()
    return -ratio * advantage * norm * (1 + statistics.first_argmax % 2)


def user_loss(token_loss, hidden, weight, labels, old_logprob, advantage, token_weights, **options):
    call = functools.partial(compiled_loss.linear_token_loss, token_weights=token_weights, **options)
    return call(hidden, weight, labels, token_loss, old_logprob, advantage, 0.2, 0.3)


def of_user(strategy, shape, token_loss, **options):
    """A user's loss, with weights and two inputs a token, whose advantages want a gradient."""
    case = linear(strategy, shape, **options)
    rows = f"fp32[{shape[0]}]"
    call = functools.partial(user_loss, token_loss, **case.call.keywords)
    return replace(case, call=call, inputs=(*case.inputs, rows, f"{rows}:grad", rows))


def on_logits(shape, *, grad=True, **options):
    tokens, _, vocab = shape
    inputs = (f"bf16[{tokens},{vocab}]" + (":grad" if grad else ""), f"int64[{tokens}]:0..{vocab - 1}")
    call = functools.partial(compiled_loss.cross_entropy, **options)
    outputs = 2 * tokens * vocab if grad else 0
    return Case(call, inputs, outputs=outputs, chunk=0, options={} if grad else {"backward": False})


def with_teacher(hidden, weight, teacher_hidden, teacher_weight, labels, **options):
    return compiled_loss.linear_distillation(hidden, weight, teacher_hidden, teacher_weight, labels, **options)


def with_teacher_and_statistics(hidden, weight, teacher_hidden, teacher_weight, labels, **options):
    call = compiled_loss.linear_distillation_with_statistics
    found = call(hidden, weight, teacher_hidden, teacher_weight, labels, **options)
    return found.loss, [v for v in found.statistics if v is not None]


def with_soft_teacher(hidden, weight, teacher_hidden, teacher_weight, labels, **options):
    teacher = {"teacher_hidden": teacher_hidden, "teacher_weight": teacher_weight}
    return compiled_loss.linear_soft_cross_entropy(hidden, weight, labels != 0, **teacher, **options)


def two_heads(call, shape, size=None, **options):
    """A student's head and its teacher's, half as wide, in 4 even chunks or of `size`: each holds two of logits."""
    tokens, width, vocab = shape
    rows = size or tokens // 4
    inputs = (f"bf16[{tokens},{width}]:grad", f"bf16[{vocab},{width}]:grad")
    inputs += (f"bf16[{tokens},{width // 2}]", f"bf16[{vocab},{width // 2}]", f"int64[{tokens}]:0..{vocab - 1}")
    outputs = 2 * (tokens + vocab) * width
    chunking = Chunking(chunk_size=rows, accumulate_dtype=torch.bfloat16)
    return Case(
        functools.partial(call, chunking=chunking, **options),
        inputs,
        outputs=outputs,
        chunk=2 * 2 * rows * vocab,
        chunks=4,
        forward=3.5,
        keeps=outputs,
        generated=(2, 0),
    )


def with_top(hidden, weight, values, indices, labels, **options):
    keywords = {"teacher_topk": (values, indices), **options}
    return compiled_loss.linear_distillation(hidden, weight, None, None, labels, **keywords)


def head_and_top(shape, k=64, **options):
    """A student's head and the top of its teacher, in 4 even chunks."""
    case = two_heads(with_top, shape, **options)
    tokens, _, vocab = shape
    inputs = (*case.inputs[:2], f"bf16[{tokens},{k}]", f"int64[{tokens},{k}]:0..{vocab - 1}", case.inputs[-1])
    return replace(case, inputs=inputs, chunk=case.chunk // 2, forward=3, generated=(9, 0))  # most of them on [N, k]


def logits_and_top(logits, values, indices, labels, **options):
    return compiled_loss.distillation(logits, None, labels, teacher_topk=(values, indices), **options)


def two_logits(call, shape, **options):
    tokens, _, vocab = shape
    logits = f"bf16[{tokens},{vocab}]"
    inputs = (logits + ":grad", logits, f"int64[{tokens}]:0..{vocab - 1}")
    return Case(functools.partial(call, **options), inputs, outputs=2 * tokens * vocab, chunk=0)


def soft_logits(logits, target_probs, labels):
    return compiled_loss.masked_soft_cross_entropy(logits, target_probs, labels != 0)


def divergences(shape):
    """{name: Case} of the losses of two distributions."""
    found = {"teacher, soft": two_heads(with_soft_teacher, shape), "logits, soft": two_logits(soft_logits, shape)}
    options = {"temperature": 2.0, "hard_label_weight": 0.3}
    for kind in ("forward_kl", "reverse_kl", "jsd"):
        found[f"teacher, {kind}"] = two_heads(with_teacher, shape, divergence=kind)
        found[f"logits, {kind}"] = two_logits(compiled_loss.distillation, shape, divergence=kind)
    recomputed = two_heads(with_teacher, shape, reduction="none")
    found["teacher, none"] = replace(recomputed, forward=1.5, backward=3.5, keeps=0, generated=(1, 1))
    found["top, forward_kl"] = head_and_top(shape)
    mixture = {"forward_kl": 0.5, "total_variation": meta()}
    found["teacher, mixture"] = two_heads(with_teacher, shape, divergence=mixture)
    found["logits, mixture"] = two_logits(compiled_loss.distillation, shape, divergence=mixture)
    found["teacher, lk"] = two_heads(with_teacher, shape, divergence="lk")
    found["teacher, acceptance"] = two_heads(with_teacher, shape, divergence="acceptance")
    statistics = two_heads(with_teacher_and_statistics, shape, divergence="acceptance")
    found["teacher, acceptance with statistics"] = statistics
    found["top, everything"] = head_and_top(shape, divergence="jsd", **options)
    found["teacher, everything"] = two_heads(with_teacher, shape, divergence="jsd", **options)
    found["logits, everything in two"] = two_logits(compiled_loss.distillation, shape, divergence="jsd", **options)
    return found


def cases(shape):
    """{name: Case} of every public function, each strategy and the keywords that change kernels."""
    tokens, _, vocab = shape
    found = {}
    for strategy in ("tokens", "vocab"):
        for name, options in keywords(tokens, vocab).items():
            found[f"{strategy}, {name}"] = linear(strategy, shape, **options)
        found[f"{strategy}, loss only"] = linear(strategy, shape, grad="")
        found[f"{strategy}, frozen hidden"] = linear(strategy, shape, grad="w")
        found[f"{strategy}, frozen weight"] = linear(strategy, shape, grad="h")
        with_statistics = linear(strategy, shape, function="linear_cross_entropy_with_statistics")
        found[f"{strategy}, with statistics"] = with_statistics
        found[f"{strategy}, temperatures"] = of_temperatures(strategy, shape, softcap=30.0)
    found["tokens, statistics"] = linear("tokens", shape, function="linear_token_statistics", grad="")
    found["vocab, statistics"] = linear("vocab", shape, function="linear_token_statistics")
    found["vocab, all statistics"] = linear(
        "vocab", shape, function="linear_token_statistics", softcap=30.0, wanted=NAMES
    )
    found["vocab, none"] = linear("vocab", shape, reduction="none")
    for strategy in ("tokens", "vocab"):
        found[f"{strategy}, policy"] = of_user(strategy, shape, clipped_with_entropy)
    found["tokens, user's everything"] = of_user("tokens", shape, of_everything, softcap=30.0)
    found["tokens, user's further"] = of_user("tokens", shape, of_further_statistics, softcap=30.0)
    everything = {k: v for k, v in keywords(tokens, vocab)["everything"].items() if k != "bias"}
    found["logits, plain"] = on_logits(shape)
    found["logits, none"] = on_logits(shape, reduction="none")
    found["logits, everything"] = on_logits(shape, **everything)
    found["logits, loss only"] = on_logits(shape, grad=False)
    return found | divergences(shape)


def unchunked(hidden, weight, labels):
    return torch.nn.functional.cross_entropy((hidden @ weight.t()).float(), labels)


def naive_loop(hidden, weight, labels):
    return naive.linear_cross_entropy(hidden, weight, labels, chunks=4)
