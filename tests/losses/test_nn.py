"""Contract of the Modules and their configs: constructor and call together are a function, keyword by keyword.

A keyword that a function gets and a class lacks fails here, in words that name both.
"""

import dataclasses
import inspect
import types
import typing

import pytest
import torch

import compiled_loss
from compiled_loss import LOSS_CONFIG_REGISTRY, Chunking, nn
from compiled_loss.nn.base import loss_module

SHELLS = {
    nn.CrossEntropy: compiled_loss.cross_entropy,
    nn.LinearCrossEntropy: compiled_loss.linear_cross_entropy,
}
OTHERS = {
    nn.Distillation: compiled_loss.distillation,
    nn.LinearDistillation: compiled_loss.linear_distillation,
    nn.LinearSoftCrossEntropy: compiled_loss.linear_soft_cross_entropy,
    nn.MultiTokenPrediction: compiled_loss.multi_token_prediction,
    nn.PolicyLoss: compiled_loss.policy_loss,
    nn.LinearPolicyLoss: compiled_loss.linear_policy_loss,
    nn.PreferenceLoss: compiled_loss.preference_loss,
    nn.LinearPreferenceLoss: compiled_loss.linear_preference_loss,
    nn.KTOLoss: compiled_loss.kto_loss,
    nn.LinearKTOLoss: compiled_loss.linear_kto_loss,
    nn.BradleyTerryLoss: compiled_loss.bradley_terry_loss,
}
FUNCTIONS = SHELLS | OTHERS
CONFIGS = {config.module: config for config in LOSS_CONFIG_REGISTRY.values()}
N, H, V = 13, 6, 17

# Numbers, names and a `Chunking` are the same for all batches: they are fields of the Module and of its config. All the
# rest comes with the call. The exceptions, with where the keyword is instead, and why:
EXCEPTIONS = {
    "compile": ("call", "nn.Module.compile is a method"),
    "num_pairs": ("call", "belongs to the segment_ids of a batch"),
    "divergence": ("config", "weights by name are plain values, too"),
    "class_weights": (
        "Module",
        "a tensor, the same for all batches: a buffer; no config has it, as it is no plain value",
    ),
    "temperature": (
        "config",
        "a number, the same for all batches; only the function takes a value a token",
    ),
}
WITHOUT_A_MODULE = {
    "multi_token_targets": "makes targets, not a loss",
    "make_token_weights": "makes weights, not a loss",
    "pad_ids": "lays ids side by side, not a loss",
    "linear_token_loss": "its function is no plain value",
    "linear_logits_loss": "its function is no plain value",
    "token_statistics": "gives statistics, not a loss",
    "linear_token_statistics": "gives statistics, not a loss",
    "masked_soft_cross_entropy": "the other code base has a function; its linear form has a Module",
}
SAME = {  # functions that return more than another with the same keywords
    compiled_loss.linear_cross_entropy_with_statistics: compiled_loss.linear_cross_entropy,
    compiled_loss.multi_token_losses: compiled_loss.multi_token_prediction,
    compiled_loss.distillation_with_statistics: compiled_loss.distillation,
    compiled_loss.linear_distillation_with_statistics: compiled_loss.linear_distillation,
}


def parameters(function):
    found = inspect.signature(function, eval_str=True).parameters
    return {name: p for name, p in found.items() if name != "self"}


def is_plain(annotation):
    """Whether all that an argument may be is a number, a name, a `Chunking` or None."""
    kinds = typing.get_args(annotation)
    if typing.get_origin(annotation) is typing.Literal:
        return True
    return all(map(is_plain, kinds)) if kinds else annotation in (int, float, bool, str, Chunking, types.NoneType)


def place(parameter):
    """Where a keyword belongs: the call, the Module, or also the config."""
    if parameter.kind is not parameter.KEYWORD_ONLY:
        return "call"
    usual = "config" if is_plain(parameter.annotation) else "call"
    return EXCEPTIONS.get(parameter.name, (usual,))[0]


def drift(module, config, function):
    """What the classes lack of a function's keywords, have in another way, or have and the function has not."""
    theirs = parameters(function)
    fields = {f.name: f.default for f in dataclasses.fields(config)}
    found = []
    for name, p in theirs.items():
        kept, called = parameters(module).get(name), parameters(module.forward).get(name)
        wanted = place(p)
        if wanted != "call" and kept is None:
            found.append(f"{module.__name__} lacks {name}")
        if wanted == "config" and name not in fields:
            found.append(f"{config.__name__} lacks {name}")
        if wanted == "call" and called is None:
            found.append(f"{module.__name__}.forward lacks {name}")
        for mine in (kept, called):
            if mine is None:
                continue
            narrower = name in EXCEPTIONS and mine.annotation in typing.get_args(p.annotation)
            if (mine.kind, mine.default) != (p.kind, p.default) or not (narrower or mine.annotation == p.annotation):
                found.append(f"{module.__name__}: {mine}, but {function.__name__}: {p}")
        if name in fields and fields[name] != p.default:
            found.append(f"{config.__name__}: {name} = {fields[name]}, but {function.__name__}: {p}")
        if wanted != "config" and name in fields:
            found.append(f"{config.__name__} has {name}, which belongs to the {wanted}")
    for owner, names in ((module, parameters(module)), (module, parameters(module.forward)), (config, fields)):
        found += [f"{owner.__name__} has {name}, which {function.__name__} has not" for name in names.keys() - theirs]
    order = [name for name in parameters(module.forward) if name in theirs]
    if order != [name for name in theirs if name in order]:
        found.append(f"{module.__name__}.forward has another order than {function.__name__}")
    return found


@pytest.mark.parametrize("module", FUNCTIONS)
def test_modules_and_configs_have_the_keywords_of_their_function(module):
    found = drift(module, CONFIGS[module], FUNCTIONS[module])
    assert not found, found
    assert not parameters(module).keys() & parameters(module.forward).keys(), "a keyword is both kept and passed"
    returned = inspect.signature(module.forward).return_annotation
    assert returned is inspect.signature(FUNCTIONS[module], eval_str=True).return_annotation


def test_every_loss_has_a_module_or_nothing_to_keep():
    assert {module.__name__ for module in FUNCTIONS} == set(nn.__all__)
    for name in compiled_loss.__all__:
        function = getattr(compiled_loss, name)
        if getattr(function, "__module__", "").startswith("compiled_loss.functional") and not inspect.isclass(function):
            signature = inspect.signature(function, eval_str=True)
            kept = [p.name for p in signature.parameters.values() if place(p) != "call"]
            served = function in FUNCTIONS.values() or function in SAME or name in WITHOUT_A_MODULE
            assert served or not kept, f"{name} keeps {kept}"


@pytest.mark.parametrize(("function", "other"), SAME.items())
def test_functions_that_return_more_have_the_same_keywords(function, other):
    without_effect = ("fp32_upcast", "chunk_size")  # kept for callers of the other
    theirs = {name: p for name, p in parameters(other).items() if name not in without_effect}
    assert {name: p for name, p in parameters(function).items() if name != "wanted"} == theirs


def changed(function, change):
    """A function with other parameters."""
    signature = inspect.signature(function, eval_str=True)

    def replacement():
        """Only its signature matters."""

    replacement.__signature__ = signature.replace(parameters=list(change(dict(signature.parameters)).values()))
    replacement.__name__ = function.__name__
    return replacement


def with_(name, default=None, annotation=float | None):
    new = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
    return lambda ps: {**ps, name: new}


def replaced(which, **changes):
    return lambda ps: {**ps, which: ps[which].replace(**changes)}


@pytest.mark.parametrize("module", FUNCTIONS)
def test_a_new_keyword_is_missed_by_name(module):
    function, config = FUNCTIONS[module], CONFIGS[module]
    new = changed(function, with_("sharpness"))
    assert drift(module, config, new) == [f"{module.__name__} lacks sharpness", f"{config.__name__} lacks sharpness"]
    new = changed(function, with_("positions", annotation=torch.Tensor | None))
    assert drift(module, config, new) == [f"{module.__name__}.forward lacks positions"]
    assert drift(loss_module(new)(type(module.__name__, (module,), {})), config, new) == []  # when it is made again


DRIFT = {
    "softcap missing": lambda ps: {k: p for k, p in ps.items() if k != "softcap"},
    "mask missing": lambda ps: {k: p for k, p in ps.items() if k != "mask"},
    "another default": replaced("ignore_index", default=-1),
    "another default of a tensor": replaced("mask", default=1),
    "another type": replaced("temperature", annotation=int),
    "another kind": replaced("labels", kind=inspect.Parameter.KEYWORD_ONLY),
    "another order": lambda ps: {name: ps[name] for name in ["weight", "hidden", *list(ps)[2:]]},
}


@pytest.mark.parametrize("change", DRIFT)
def test_a_difference_is_seen(change):
    module, function = nn.LinearCrossEntropy, compiled_loss.linear_cross_entropy
    assert drift(module, CONFIGS[module], changed(function, lambda ps: ps)) == []
    assert drift(module, CONFIGS[module], changed(function, DRIFT[change]))


def test_a_drifted_class_is_seen():
    class Drifted(nn.CrossEntropy):
        def __init__(self, *, ignore_index: int = -1, **keywords):
            super().__init__(ignore_index=ignore_index, **keywords)

    @dataclasses.dataclass
    class DriftedConfig(CONFIGS[nn.CrossEntropy]):
        class_weights: float = 0.0
        shift: int = 1

    assert drift(Drifted, CONFIGS[nn.CrossEntropy], compiled_loss.cross_entropy)
    found = drift(nn.CrossEntropy, DriftedConfig, compiled_loss.cross_entropy)
    assert "DriftedConfig has class_weights, which belongs to the Module" in found
    assert "DriftedConfig: shift = 1, but cross_entropy: shift: int = 0" in found


@pytest.mark.parametrize("module", FUNCTIONS)
def test_all_that_is_kept_or_passed_arrives(module):
    """Each by its own object, where the function would be."""
    signature, seen = inspect.signature(FUNCTIONS[module], eval_str=True), {}

    def function(*args, **kwargs):
        seen.update(signature.bind(*args, **kwargs).arguments)

    function.__signature__ = signature
    made = loss_module(function)(type(module.__name__, (module,), {}))()
    kept = {name: torch.zeros(1) if name == "class_weights" else object() for name in parameters(module)}
    passed = {name: object() for name in parameters(module.forward)}
    for name, value in kept.items():
        assert getattr(made, name) == signature.parameters[name].default
        setattr(made, name, value)
    made(**passed)
    assert seen.keys() == kept.keys() | passed.keys()
    assert all(seen[name] is value for name, value in (kept | passed).items())


BAD = {
    "divergence": "kl",
    "logit_scale": 0.0,
    "teacher_softcap": 0.0,
    "teacher_logit_scale": -1.0,
    "temperature": 0.0,
    "temperature_squared": 2,
    "lk_decay": -1.0,
    "scaling_factor": -1.0,
    "reduction": "avg",
    "chunking": 4,
}
BAD |= {"ignore_index": "pad", "softcap": 0.0, "hard_label_weight": 2.0, "jsd_weight": 1.0, "chunk_size": -1}
BAD |= {"fp32_upcast": 1, "class_dim": "classes", "label_smoothing": 2.0, "z_loss": -1.0, "shift": -1}
BAD |= {"kind": "vote", "importance": "turn", "clip_low": -0.1, "clip_high": "0.2", "dual_clip": 1.0, "kl": "k4"}
BAD |= {"temperature_positive": 0.0, "temperature_negative": -1.0, "kl_coefficient": -1, "entropy_coefficient": None}
BAD |= {"beta": 0.0, "margin": -1.0, "length_normalised": 1, "f_divergence": "kl", "alpha": float("nan")}
BAD |= {"sft_coefficient": -1.0, "desirable_weight": -1.0, "undesirable_weight": "1", "center_coefficient": -0.1}
BAD |= {"class_weights": torch.ones(2, requires_grad=True), "logit_softcapping": -1.0, "tp_group": "tp"}
BAD |= {"impl": "triton", "chunk_len": 0, "compile": "auto"}


@pytest.mark.parametrize("owner", [*CONFIGS, *CONFIGS.values()])
def test_validated_when_made(owner):
    """A keyword without a bad value here, and one that takes its bad value, fail."""
    for name in parameters(owner):
        with pytest.raises((ValueError, TypeError), match=f"^{name}: expected"):
            owner(**{name: BAD[name]})
