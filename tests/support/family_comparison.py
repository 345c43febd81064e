"""The loss and all gradients of a model's fused head beside its own: equal, refused, or different."""

import functools
import inspect
import math
import traceback
from typing import NamedTuple

import torch
from family_inputs import batch
from family_models import EPS, build, compute, shake, truth

from compiled_loss.integrations.transformers import fuse_head, unfuse_head

ULPS = 4  # of a result: one more rounding of a sum, a quotient, a scale and a cast
SHAKES = 4  # runs of the model's own loss with other roundings
COUNT = torch.tensor(23)  # items of a step: no number of tokens of the batch


class Row(NamedTuple):
    """What became of one case: its line of the table."""

    name: str
    outcome: str  # equal, refused, different, not built
    reason: str = ""
    own_loss: float | None = None
    fused_loss: float | None = None
    own_error: float | None = None  # the largest of a gradient's, relative to its size
    fused_error: float | None = None
    items: str = ""  # whether num_items_in_batch divides the loss: honoured, ignored, not taken


def row(name, kind, given):
    """Build the class's tiny model, compare, and say what became of it; `given` overrules its config."""
    make = functools.partial(build, kind, given)  # a copy would not do: some models keep the state of a step
    try:
        model = make()
        arguments = batch(model)
        own = compute(model, arguments)
    except Exception as error:  # transformers' own, or a config that this folder does not know how to make
        return Row(name, "not built", one_line(error))
    if not own.loss.isfinite():
        return Row(name, "not built", "its own loss is not finite")
    exact = truth(make(), arguments)
    items = role_of_items(model, arguments, own)
    row = Row(name, "equal", "", float(own.loss), None, largest_error(own, exact), None, items)
    attributes, evaluated = names_of_attributes(model), evaluation(model, arguments)
    try:
        fuse_head(model)
        same_evaluation = same(evaluation(model, arguments), evaluated)
        fused = compute(model, arguments)
    except Exception as error:
        return row._replace(outcome="refused" if is_refusal(error) else "different", reason=one_line(error))
    row = row._replace(fused_loss=float(fused.loss), fused_error=largest_error(fused, exact))
    by_items = None if items == "not taken" else compute(model, arguments | {"num_items_in_batch": COUNT})
    unfuse_head(model)
    wrong = differences(make, arguments, fused, own, exact)
    if by_items is not None:
        with_items = arguments | {"num_items_in_batch": COUNT}
        wrong += differences(make, with_items, by_items, compute(model, with_items), truth(make(), with_items))
    if isinstance(fused.logits, torch.Tensor):
        wrong.append("logits are made")
    if not same_evaluation:
        wrong.append("evaluation is another")
    if names_of_attributes(model) != attributes:
        wrong.append("unfuse_head leaves attributes")
    return row._replace(outcome="different", reason="; ".join(wrong[:3])) if wrong else row


def role_of_items(model, arguments, own):
    takes = inspect.signature(model.forward).parameters
    if "num_items_in_batch" not in takes and not any(p.kind is p.VAR_KEYWORD for p in takes.values()):
        return "not taken"
    try:
        divided = compute(model, arguments | {"num_items_in_batch": COUNT})
    except TypeError:
        return "not taken"
    return "ignored" if torch.equal(divided.loss, own.loss) else "honoured"


def differences(make, arguments, found, own, exact):
    """Where errors exceed twice the model's own and some roundings."""
    wrong = beyond_budget(found, [own], exact)
    if not wrong:
        return []
    # Of a gradient that is one number, or few, the error of one run is chance: see what other roundings do.
    shaken = [compute(shake(make(), seed), arguments) for seed in range(SHAKES)]
    return beyond_budget(found, [own, *shaken], exact)


def beyond_budget(found, runs, exact):
    wrong = []
    rounding = EPS * 1e-2 * largest_size(exact)  # what gradients that are zero in fp64, as of a key's bias, consist of
    for name in ["loss", *exact.gradients]:
        mine, true, *theirs = (v.loss if name == "loss" else v.gradients[name] for v in (found, exact, *runs))
        if (mine is None) != (theirs[0] is None):
            wrong.append(f"{name}: got {'no gradient' if mine is None else 'a gradient'}")
        elif mine is not None:
            budget = 2 * max(error(v, true) for v in theirs) + ULPS * EPS * size(true) + rounding
            if not error(mine, true) <= budget:
                wrong.append(f"{name}: error {error(mine, true):.1e} of {size(true):.1e} exceeds {budget:.1e}")
    return wrong


def error(found, exact):
    """Root of the mean square over all elements."""
    return size(found.double() - exact)


def size(value):
    return math.sqrt(float(value.double().square().mean())) if value.numel() else 0.0


def largest_size(exact):
    return max(size(gradient) for gradient in exact.gradients.values() if gradient is not None)


def largest_error(found, exact):
    """Relative, over the gradients that are more than rounding."""
    least = 1e-6 * largest_size(exact)
    pairs = [(found.gradients[name], true) for name, true in exact.gradients.items() if true is not None]
    return max(error(mine, true) / size(true) for mine, true in pairs if mine is not None and size(true) > least)


def evaluation(model, arguments):
    """Loss and logits in evaluation."""
    model.eval()
    torch.manual_seed(0)
    with torch.no_grad():
        output = model(**arguments)
    model.train()
    return output.loss, getattr(output, "logits", output.loss)


def same(found, expected):
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def names_of_attributes(model):
    return {name: sorted(vars(module)) for name, module in model.named_modules()}


def is_refusal(error):
    """One of our errors, and not a crash."""
    last = traceback.extract_tb(error.__traceback__)[-1].filename
    return "compiled_loss" in last and isinstance(error, ValueError | TypeError | RuntimeError | AttributeError)


def one_line(error):
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
