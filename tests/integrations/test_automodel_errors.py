"""Errors of NeMo Automodel's Modules name their callers' own arguments."""

import inspect
import re

import pytest
import torch

import compiled_loss
from compiled_loss import checks

N, H, V = 13, 6, 17

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
    compiled_loss.ChunkedCrossEntropy: (
        {"compile": False},
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
    for name in inspect.signature(module).parameters:
        with pytest.raises((TypeError, ValueError), match=f"^{name}: expected"):
            module(**{**made, name: Wrong()})
    loss = module(**made)
    loss(**called)
    for name in inspect.signature(loss.forward).parameters:
        with pytest.raises((TypeError, ValueError), match=rf"^{name}(\.\w+)?: expected"):
            loss(**{**called, name: Wrong()})


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


@pytest.mark.parametrize(
    ("config", "name"), [("RecurrentGemmaConfig", "logits_soft_cap"), ("xLSTMConfig", "output_logit_soft_cap")]
)
def test_a_softcap_by_any_name_of_a_config_has_to_be_the_losses(config, name):
    config = getattr(pytest.importorskip("transformers"), config)(**{name: 20.0})
    head = torch.nn.Linear(H, V, bias=False)
    assert FUSED(logit_softcapping=20.0).validate_lm_head(head, model_config=config) is head
    for loss, softcap in ((FUSED(), None), (FUSED(logit_softcapping=30.0), 30.0)):
        text = f"model_config: expected {softcap}, which FusedLinearCrossEntropy applies, as {name}, got 20.0: use"
        with pytest.raises(ValueError, match="^" + re.escape(text)):
            loss.validate_lm_head(head, model_config=config)


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
