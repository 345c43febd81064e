"""Typed configs: fields, validation, round trip, registry by key and class identity, the documented dispatch."""

import dataclasses
import inspect
import json
import subprocess
import sys
from dataclasses import dataclass
from functools import partial

import pytest
import torch
import yaml
from torch import nn

import compiled_loss
from compiled_loss import (
    LOSS_CONFIG_REGISTRY,
    Chunking,
    CrossEntropyConfig,
    DistillationConfig,
    FusedLinearCEConfig,
    KDLossConfig,
    LinearCrossEntropyConfig,
    LinearDistillationConfig,
    LinearSoftCrossEntropyConfig,
    LossConfig,
    LossFromFactoryConfig,
    MaskedCrossEntropyConfig,
    MTPLossConfig,
    MultiTokenPredictionConfig,
    TEParallelCEConfig,
    build_loss_config,
    build_loss_module,
    register_loss_config,
)

FIELDS = {
    MaskedCrossEntropyConfig: {"fp32_upcast": True, "ignore_index": -100, "reduction": "sum"},
    FusedLinearCEConfig: {"ignore_index": -100, "logit_softcapping": 0.0, "reduction": "sum"},
    TEParallelCEConfig: {"ignore_index": -100, "reduction": "sum", "tp_group": None},
    KDLossConfig: {"ignore_index": -100, "temperature": 1.0, "fp32_upcast": True, "tp_group": None, "chunk_size": 0},
    MTPLossConfig: {"scaling_factor": None, "ignore_index": -100},
}
OURS = [CrossEntropyConfig, LinearCrossEntropyConfig, DistillationConfig, LinearDistillationConfig]
OURS += [LinearSoftCrossEntropyConfig, MultiTokenPredictionConfig]
NOT_WRITTEN = {"class_weights", "fp32_upcast", "chunk_size"}  # a tensor, and what has no effect
LOSSES = [c for c in FIELDS if c is not MTPLossConfig]


@pytest.mark.parametrize("config", FIELDS)
def test_fields_and_defaults(config):
    assert dataclasses.asdict(config()) == FIELDS[config]
    for name in FIELDS[config]:
        assert f"{name}:" in config.__doc__


@pytest.mark.parametrize("config", LOSSES)
def test_build(config):
    made = config(ignore_index=3).build()
    assert isinstance(made, nn.Module) and made.ignore_index == 3
    for name, value in FIELDS[config].items():
        if name != "ignore_index":
            assert getattr(made, name) == value
    assert type(made) is config.module is getattr(compiled_loss, config.module.__name__)


@pytest.mark.parametrize("config", FIELDS)
def test_round_trip(config):
    one = config(ignore_index=7)
    text = json.dumps(one.to_dict())
    assert "tp_group" not in text
    assert config.from_dict(json.loads(text)) == one
    assert config.from_dict(yaml.safe_load(yaml.safe_dump(one.to_dict()))) == one
    with pytest.raises(TypeError, match=rf"^{config.__name__}: expected of .*ignore_index.*, got typo"):
        config.from_dict({"typo": 1})


@pytest.mark.parametrize("config", OURS)
def test_configs_of_our_modules(config):
    """The fields are the Module's keywords, with its defaults; by name and by class; through YAML."""
    made, module = config().build(), config.module
    assert module.__module__.startswith("compiled_loss.nn.") and type(made) is module
    keywords = {k: p.default for k, p in inspect.signature(module).parameters.items() if k not in NOT_WRITTEN}
    assert {f.name: f.default for f in dataclasses.fields(config)} == keywords
    for name, value in keywords.items():
        assert f"{name}:" in config.__doc__ or f"{name}," in config.__doc__
        assert getattr(made, name) == value
    assert build_loss_config(module.__name__) == build_loss_config(module) == config()
    options = {"chunking": Chunking(chunk_size=5, accumulate_dtype=torch.float32), "temperature": 0.5, "shift": 1}
    one = config(**{name: value for name, value in options.items() if name in keywords})
    assert config.from_dict(yaml.safe_load(yaml.safe_dump(one.to_dict()))) == one
    if "chunking" in keywords:
        with pytest.raises(TypeError, match=r"^Chunking: expected of strategy, chunk_size, .*, got size"):
            config.from_dict({"chunking": {"size": 4}})
        with pytest.raises(TypeError, match=r"^chunking: expected a Chunking, got int"):
            config(chunking=4)
        with pytest.raises(TypeError, match=r"^accumulate_dtype: expected a floating torch.dtype or None, got 'half!'"):
            config.from_dict({"chunking": {"accumulate_dtype": "half!"}})


def test_a_process_group_is_not_written_down():
    class Group:
        def size(self):
            return 1

    with pytest.raises(ValueError, match=r"^tp_group: expected None in a KDLossConfig that is written down, got Group"):
        KDLossConfig(tp_group=Group()).to_dict()
    with pytest.raises(TypeError, match=r"^tp_group: expected a process group or None, got str"):
        KDLossConfig(tp_group="tp")


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (partial(MaskedCrossEntropyConfig, reduction="avg"), "reduction: expected one of 'none', 'sum', 'mean'"),
        (partial(MaskedCrossEntropyConfig, ignore_index="pad"), "ignore_index: expected an int, got str"),
        (partial(FusedLinearCEConfig, logit_softcapping=-2.0), "logit_softcapping: expected a number >= 0"),
        (partial(KDLossConfig, temperature=-1.0), "temperature: expected a number > 0, got -1.0"),
        (partial(KDLossConfig, chunk_size=1.5), "chunk_size: expected an int >= 0, got float"),
        (partial(MTPLossConfig, scaling_factor=-0.1), "scaling_factor: expected a number >= 0 or None, got -0.1"),
        (partial(LossFromFactoryConfig), "factory: expected a callable that returns a loss, got NoneType"),
    ],
)
def test_validated_on_construction_and_at_build(make, text):
    """loss.py:62: reduction="avg" was accepted."""
    with pytest.raises((TypeError, ValueError), match="^" + text):
        make()
    if make.keywords:
        assigned = make.func()
        for name, value in make.keywords.items():
            setattr(assigned, name, value)
        arguments = (nn.Identity(), nn.Identity()) if make.func is MTPLossConfig else ()
        with pytest.raises((TypeError, ValueError), match="^" + text):
            assigned.build(*arguments)


def test_dispatch():
    config = KDLossConfig(temperature=2.0)
    assert build_loss_config(config) is config
    assert build_loss_config("KDLoss", temperature=3.0) == KDLossConfig(temperature=3.0)
    assert build_loss_config(compiled_loss.KDLoss, temperature=3.0) == KDLossConfig(temperature=3.0)
    assert build_loss_module("FusedLinearCrossEntropy", logit_softcapping=5.0).logit_softcapping == 5.0
    wrapped = build_loss_config(nn.CrossEntropyLoss, reduction="sum")
    assert wrapped == LossFromFactoryConfig(factory=nn.CrossEntropyLoss, kwargs={"reduction": "sum"})
    assert wrapped.build().reduction == "sum"
    chunking = compiled_loss.Chunking(chunk_size=3)  # no field of the config: the class itself is called
    assert build_loss_module(compiled_loss.FusedLinearCrossEntropy, chunking=chunking).chunking == chunking


def test_a_users_class_of_the_same_name_is_not_replaced():
    """loss.py:245 matched by __name__."""

    class KDLoss(nn.Module): ...

    assert type(build_loss_module(KDLoss)) is KDLoss


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            partial(build_loss_config, KDLossConfig(), temperature=2.0),
            ValueError,
            "loss_kwargs: expected none",
        ),
        (partial(build_loss_config, KDLossConfig), TypeError, "loss: expected a config, .* got the class KDLossConfig"),
        (partial(build_loss_config, MTPLossConfig()), TypeError, "loss: expected .*MTPLossConfig: call its build"),
        (partial(build_loss_config, MTPLossConfig), TypeError, "loss: expected .* got the class MTPLossConfig"),
        (
            partial(build_loss_config, "torch.nn.CrossEntropyLoss"),
            TypeError,
            "loss: expected .*dotted",
        ),
        (partial(build_loss_config, 3), TypeError, "loss: expected .*, got 3"),
        (partial(build_loss_config, "KDLoss", nonsense=1), TypeError, ".*nonsense"),
        (partial(build_loss_module, None), TypeError, "loss: expected .*, got None"),
    ],
)
def test_refusals(call, error, text):
    with pytest.raises(error, match="^" + text):
        call()


def test_third_parties_register(monkeypatch):
    class Mine(nn.Module):
        def __init__(self, scale=1.0):
            super().__init__()
            self.scale = scale

    @dataclass
    class MineConfig(LossConfig):
        module = Mine
        scale: float = 1.0

    @dataclass
    class OtherConfig(LossConfig): ...

    registry = dict(LOSS_CONFIG_REGISTRY)
    monkeypatch.setattr("compiled_loss.config.LOSS_CONFIG_REGISTRY", registry)
    register_loss_config("mine", MineConfig)
    register_loss_config("mine", MineConfig)  # again: nothing changes
    assert build_loss_module("mine", scale=2.0).scale == build_loss_module(Mine, scale=2.0).scale == 2.0
    assert type(build_loss_config(Mine)) is MineConfig
    with pytest.raises(ValueError, match=r"^name: expected one that is not taken, got 'mine', which is MineConfig"):
        register_loss_config("mine", OtherConfig)
    with pytest.raises(TypeError, match=r"^config: expected a subclass of LossConfig, got "):
        register_loss_config("other", Mine)
    with pytest.raises(NotImplementedError, match=r"^OtherConfig: expected a subclass that overrides build"):
        OtherConfig().build()


def test_importing_the_package_imports_nothing_optional():
    """linear_ce.py:126 patched a third party's module when it was imported."""
    optional = ["triton", "transformers", "accelerate", "matplotlib", "rich", "cloudpickle"]
    code = "import sys, torch; before = set(sys.modules); import compiled_loss, compiled_loss.huggingface"
    code += f"; new = set(sys.modules) - before; print([name for name in {optional} if name in new])"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_mtp_builds_with_a_loss_and_a_model():
    model = nn.Linear(3, 3)
    made = MTPLossConfig(scaling_factor=0.5).build(compiled_loss.MaskedCrossEntropy(), model)
    assert (made.scaling_factor, made.ignore_index, made.model) == (0.5, -100, model)
    assert isinstance(made, compiled_loss.PipelineCausalLMLoss)
