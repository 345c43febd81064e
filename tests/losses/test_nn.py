"""Contract of the Modules and their configs: constructor and call together are a function, keyword by keyword.

A keyword that a function gets and a class lacks fails here, in words that name both.
"""

import dataclasses
import inspect
import re
import types
import typing

import cases
import pytest
import torch

import compiled_loss
from compiled_loss import LOSS_CONFIG_REGISTRY, Chunking, checks, nn
from compiled_loss.nn.base import loss_module
from compiled_loss.testing import head_inputs

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

# Signatures ---------------------------------------------------------------------------------------------------------

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


@pytest.mark.parametrize("owner", [*CONFIGS, *CONFIGS.values()])
def test_validated_when_made(owner):
    """A keyword without a bad value here, and one that takes its bad value, fail."""
    for name in parameters(owner):
        with pytest.raises((ValueError, TypeError), match=f"^{name}: expected"):
            owner(**{name: BAD[name]})


# Errors of NeMo Automodel's Modules name their own arguments ---------------------------------------------------------

LABELS = torch.zeros(1, 3, dtype=torch.int64)
LOGITS, STATES = torch.zeros(1, 3, V), torch.zeros(1, 3, H)
HEAD = torch.nn.ModuleDict({"lm_head": torch.nn.Linear(H, V)})
PIPELINE = {"loss_fn": compiled_loss.MaskedCrossEntropy(), "model": HEAD}
COMPAT = {  # what the constructor needs, and what the call
    compiled_loss.MaskedCrossEntropy: ({}, {"logits": LOGITS, "labels": LABELS}),
    compiled_loss.FusedLinearCrossEntropy: (
        {},
        {"hidden_states": STATES, "labels": LABELS, "lm_weight": torch.zeros(V, H)},
    ),
    compiled_loss.TEParallelCrossEntropy: ({}, {"logits": LOGITS, "labels": LABELS}),
    compiled_loss.KDLoss: ({}, {"student_logits": LOGITS, "teacher_logits": LOGITS, "labels": LABELS}),
    compiled_loss.PipelineCausalLMLoss: (PIPELINE, {"output": LOGITS, "labels": LABELS}),
}
FUSED = compiled_loss.FusedLinearCrossEntropy


class Wrong:
    """What no argument may be."""


@pytest.mark.parametrize("module", COMPAT)
def test_errors_name_each_argument(module):
    made, called = COMPAT[module]
    for name in parameters(module):
        with pytest.raises((TypeError, ValueError), match=f"^{name}: expected"):
            module(**{**made, name: Wrong()})
    module(**made)(**called)
    for name in parameters(module.forward):
        with pytest.raises((TypeError, ValueError), match=rf"^{name}(\.\w+)?: expected"):
            module(**made)(**{**called, name: Wrong()})


def test_errors_name_the_arguments_of_every_automodel_module():
    modules = [getattr(compiled_loss, name) for name in compiled_loss.__all__]
    assert {m for m in modules if isinstance(m, type) and issubclass(m, torch.nn.Module)} == COMPAT.keys()
    with pytest.raises(TypeError, match=r"^scaling_factor: expected a number or None, got Wrong"):
        compiled_loss.MTPLossConfig(scaling_factor=Wrong())
    with pytest.raises(TypeError, match=r"^ignore_index: expected an int, got Wrong"):
        compiled_loss.MTPLossConfig(ignore_index=Wrong())


def piped(output, loss_fn=PIPELINE["loss_fn"], **keywords):
    return compiled_loss.PipelineCausalLMLoss(loss_fn, HEAD)(output, LABELS, **keywords)


TEXTS = [
    (
        FUSED,
        {"lm_weight": torch.zeros(H, V)},
        "hidden_states: expected [..., H] with H = 17, the width of lm_weight, got [1, 3, 6]: use lm_weight.t() where",
    ),
    (FUSED, {"lm_weight": torch.zeros(V)}, "lm_weight: expected [V, H] with V >= 1 and H >= 1, got [17]"),
    (
        FUSED,
        {"lm_weight": torch.zeros(2, V, H), "hidden_states": STATES[0], "labels": LABELS[0]},
        "lm_weight: expected [V, H] with V >= 1 and H >= 1, got [2, 17, 6]: hidden_states comes first, lm_weight third",
    ),
    (
        FUSED,
        {"lm_weight": torch.nn.Linear(H, V)},
        "lm_weight: expected a Tensor, got Linear: use linear.weight and lm_bias=linear.bias",
    ),
    (
        FUSED,
        {"lm_weight": torch.zeros(V, H).half()},
        "lm_weight: expected the dtype of hidden_states, torch.float32, got torch.float16: cast one of them",
    ),
    (FUSED, {"lm_bias": torch.zeros(H)}, "lm_bias: expected [V] = [17], got [6]"),
    (
        FUSED,
        {"labels": torch.zeros(V, dtype=torch.int64)},
        "labels: expected the shape of hidden_states without its last dimension, [1, 3], got [17]: hidden_states comes "
        "first, its weight third",
    ),
    (
        FUSED,
        {"labels": torch.zeros(1, 4, dtype=torch.int64)},
        "labels: expected the shape of hidden_states without its last dimension, [1, 3], got [1, 4]",
    ),
    (FUSED, {"hidden_states": STATES.long()}, "hidden_states: expected float32, bfloat16, float16 or float64, got"),
    (FUSED, {"num_label_tokens": -1}, "num_label_tokens: expected >= 0, got -1"),
    (compiled_loss.KDLoss, {"num_batch_labels": -1}, "num_batch_labels: expected >= 0, got -1"),
    (compiled_loss.KDLoss, {"num_batch_labels": torch.ones(2)}, "num_batch_labels: expected one element, got [2]"),
    (
        compiled_loss.KDLoss,
        {"teacher_logits": torch.zeros(1, 3, 2)},
        "teacher_logits: expected the shape of student_logits, [1, 3, 17], got [1, 3, 2]",
    ),
    (compiled_loss.KDLoss, {"teacher_logits": None}, "teacher_logits: expected a Tensor, got NoneType"),
    (
        compiled_loss.MaskedCrossEntropy,
        {"logits": torch.zeros(1, V, 3)},
        "labels: expected the shape of logits without its last dimension, [1, 17], got [1, 3]: use "
        "logits.movedim(1, -1)",
    ),
    (compiled_loss.MaskedCrossEntropy, {"mask": torch.ones(2)}, "mask: expected to broadcast to the labels' [1, 3]"),
]
PIPED = [
    (lambda: piped(STATES.long()), "output: expected float32, bfloat16, float16 or float64, got torch.int64"),
    (lambda: piped((STATES.long(), STATES)), "output[0]: expected float32, bfloat16, float16"),
    (lambda: piped({"logits": [1.0]}), "output.logits: expected a Tensor, got list"),
    (lambda: piped({}), "output.logits: expected, for MaskedCrossEntropy takes them, got None"),
    (lambda: piped({}, FUSED()), "output.hidden_states: expected, for FusedLinearCrossEntropy takes them"),
    (lambda: piped((LOGITS, STATES, torch.zeros(1, 2).int())), "output[-1]: expected the labels' shape [1, 3] or [3]"),
    (
        lambda: piped((STATES, STATES[:, :2]), FUSED()),
        "output[1:][0]: expected the labels' [1, 3] tokens and one width",
    ),
    (
        lambda: piped({"logits": LOGITS, "mtp_per_depth_h": [STATES, None]}),
        "output.mtp_per_depth_h[1]: expected a Tensor, got NoneType",
    ),
    (lambda: piped(STATES[..., 1:], FUSED()), "output: expected [..., H] with H = 6, the width of lm_weight, got"),
]


@pytest.mark.parametrize(("module", "given", "text"), TEXTS, ids=[case[2][:40] for case in TEXTS])
def test_errors_speak_of_the_callers_arguments_alone(module, given, text):
    made, called = COMPAT[module]
    with pytest.raises((TypeError, ValueError), match="^" + re.escape(text)):
        module(**made)(**{**called, **given})
    if not any(isinstance(value, torch.nn.Module) for value in given.values()):  # which Dynamo looks at first
        compiled = torch.compile(module(**made), backend="eager", fullgraph=True)
        with pytest.raises(Exception, match=re.escape(text)):
            compiled(**{**called, **given})


@pytest.mark.parametrize(("call", "text"), PIPED, ids=[text[:40] for _, text in PIPED])
def test_errors_of_a_pipeline_say_which_part_of_the_output(call, text):
    with pytest.raises((TypeError, ValueError), match="^" + re.escape(text)):
        call()


def test_errors_of_depths_name_the_arguments_of_calculate_mtp_loss():
    def text(**call):
        with pytest.raises((TypeError, ValueError)) as raised:
            compiled_loss.calculate_mtp_loss(FUSED(), labels=LABELS, lm_weight=torch.zeros(V, H), **call)
        return str(raised.value)

    targets = [LABELS, LABELS.clone()]
    assert text(mtp_per_depth_h=[STATES, 3]).startswith("mtp_per_depth_h[1]: expected a Tensor, got int")
    assert text(mtp_per_depth_h=[]).startswith("mtp_per_depth_h: expected a sequence of each depth's hidden states")
    assert text(mtp_per_depth_h=[STATES[..., 1:]]).startswith("mtp_per_depth_h[0]: expected [..., H] with H = 6")
    given = {"mtp_per_depth_h": [STATES, STATES], "mtp_per_depth_targets": targets}
    assert text(**given, mask=LABELS).startswith("mtp_per_depth_targets: expected None beside mask")
    targets[1][0, 0] = V
    assert text(**given).startswith("mtp_per_depth_targets[1]: expected 0 <= label < V = 17")


def test_what_is_no_error_of_ours_is_left_alone():
    class MineError(RuntimeError):
        def __init__(self, one, two):
            super().__init__(f"weight {one} {two}")

    def function(error):
        raise error

    for error in (MineError(1, 2), ValueError("weight is bad"), KeyError("weight: expected 3")):
        with pytest.raises(type(error)) as raised:
            checks.modules.named(weight="lm_weight")(function)(error)
        assert raised.value is error
    with pytest.raises(ValueError, match=r"^lm_weight: expected a weight, its weight, head.weight; got weights$"):
        checks.modules.named(weight="lm_weight")(function)(
            ValueError("weight: expected a weight, its weight, head.weight; got weights")
        )


def test_what_a_module_shows_of_itself():
    assert repr(nn.CrossEntropy()) == "CrossEntropy()"
    made = nn.LinearCrossEntropy(softcap=2.0, class_weights=torch.ones(V), chunking=Chunking())
    assert repr(made) == "LinearCrossEntropy(class_weights=[17], softcap=2.0)"
    assert repr(compiled_loss.KDLoss(-100, 2.0)) == "KDLoss(temperature=2.0)"


# Values -------------------------------------------------------------------------------------------------------------

# A value other than the default for every keyword, alone: one that is dropped or crossed with another changes the loss.
KEPT = {
    "class_weights": torch.linspace(0.1, 1, V),
    "ignore_index": 1,
    "label_smoothing": 0.1,
    "z_loss": 0.01,
    "softcap": 2.0,
    "logit_scale": 0.4,
    "temperature": 0.7,
    "shift": 2,
    "reduction": "none",
    "class_dim": 0,
    "chunking": Chunking(strategy="vocab", chunk_size=3),
}
PASSED = {
    "bias": torch.linspace(-1, 1, V),
    "mask": torch.arange(N) % 3 != 0,
    "token_weights": torch.linspace(0, 1, N),
    "num_label_tokens": 7,
}


@pytest.mark.parametrize(
    ("shell", "name"),
    [(s, name) for s, f in SHELLS.items() for name in [*KEPT, *PASSED] if name in inspect.signature(f).parameters],
)
def test_each_keyword_arrives(shell, name):
    function = SHELLS[shell]
    hidden, weight, labels, _ = (v.detach() for v in head_inputs(N, H, V, ignored=0.2))
    labels[:2] = 1
    if name == "class_dim":  # square, or the labels would fit one alone
        weight, labels = weight[:N], labels.clamp(max=N - 1)
    tensors = (hidden, weight, labels) if shell is nn.LinearCrossEntropy else (hidden @ weight.t(), labels)
    kept = {"reduction": "sum"} if name == "num_label_tokens" else {}
    plain = function(*tensors, **kept)
    kept.update({name: KEPT[name]} if name in KEPT else {})
    passed = {name: PASSED[name]} if name in PASSED else {}
    if name == "ignore_index":
        tensors = (*tensors[:-1], labels.clamp(min=0))
    made = shell(**kept)
    actual = made(*tensors, **passed)
    torch.testing.assert_close(actual, function(*tensors, **kept, **passed), rtol=0, atol=0)
    if name == "chunking":
        assert made.chunking is KEPT[name]
    else:
        assert actual.shape != plain.shape or not torch.allclose(actual, plain)


def test_every_keyword_has_a_value_here():
    names = {name for function in SHELLS.values() for name in inspect.signature(function).parameters}
    elsewhere = {"vocab_shard", "compile"}  # test_sharding, test_eager_kernels
    assert names == {"logits", "hidden", "weight", "labels", *elsewhere, *KEPT, *PASSED}


@pytest.mark.parametrize("shell", SHELLS)
def test_everything_and_its_gradients(shell):
    inputs = head_inputs(N, H, V, dtype=torch.float64, ignored=0.2, ignore_index=1)
    keywords = cases.everything(N, V)
    passed = {name: keywords.pop(name) for name in ("mask", "token_weights")}
    if shell is nn.LinearCrossEntropy:
        tensors, passed["bias"] = inputs[:3], inputs.bias
    else:
        tensors = ((inputs.hidden @ inputs.weight.t()).detach().requires_grad_(), inputs.labels)
    losses = [shell(**keywords)(*tensors, **passed), SHELLS[shell](*tensors, **keywords, **passed)]
    torch.testing.assert_close(*losses, rtol=0, atol=0)
    gradients = [torch.autograd.grad(loss, tensors[:-1]) for loss in losses]
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


@pytest.mark.parametrize("shell", SHELLS)
def test_no_parameters_and_class_weights_are_a_buffer(shell):
    weights = torch.linspace(0.1, 1, V)
    bare, made = shell(), shell(class_weights=weights)
    assert not [*bare.parameters(), *made.parameters()]
    assert list(bare.state_dict()) == []
    assert list(made.state_dict()) == ["class_weights"]
    assert made.to(torch.float64).class_weights.dtype == torch.float64
    assert made.to("meta").class_weights.device.type == "meta"
    assert weights.device.type == "cpu"
    assert bare.to(torch.float64).class_weights is None
    other = shell(class_weights=torch.zeros(V))
    other.load_state_dict(shell(class_weights=weights).state_dict())
    assert torch.equal(other.class_weights, weights)
    with pytest.raises(RuntimeError, match="class_weights"):
        bare.load_state_dict(other.state_dict())  # silently weighing nothing would be worse


def test_class_weights_that_moved_are_used():
    hidden, weight, labels, _ = head_inputs(N, H, V, dtype=torch.float64)
    classes = torch.linspace(0.1, 1, V)
    made = nn.LinearCrossEntropy(class_weights=classes).to(torch.float64)
    expected = compiled_loss.linear_cross_entropy(hidden, weight, labels, class_weights=classes.double())
    torch.testing.assert_close(made(hidden, weight, labels), expected, rtol=0, atol=0)


def test_shells_under_compile():
    inputs = head_inputs(N, H, V, dtype=torch.float64, ignored=0.2)
    keywords = {"class_weights": torch.rand(V), "softcap": 4.0, "z_loss": 0.1}
    for shell, tensors in (
        (nn.LinearCrossEntropy, inputs[:3]),
        (nn.CrossEntropy, ((inputs.hidden @ inputs.weight.t()).detach().requires_grad_(), inputs.labels)),
    ):
        made = shell(**keywords)
        losses = [f(*tensors) for f in (made, torch.compile(made, backend="eager", fullgraph=True))]
        torch.testing.assert_close(*losses)
        torch.testing.assert_close(*(torch.autograd.grad(loss, tensors[0]) for loss in losses))


def test_a_star_import_leaves_torchs_nn_alone():
    names = {}
    exec("import torch.nn as nn\nfrom compiled_loss import *", names)
    assert names["nn"] is torch.nn
    assert compiled_loss.nn is nn
