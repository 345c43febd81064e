"""Typed configs: fields, validation, round trip, registry by key and class identity, the documented dispatch."""

import dataclasses
import inspect
import json
import re
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
    ChunkedCEConfig,
    Chunking,
    CrossEntropyConfig,
    FusedLinearCEConfig,
    KDLossConfig,
    LossConfig,
    LossFromFactoryConfig,
    MaskedCrossEntropyConfig,
    MTPLossConfig,
    TEParallelCEConfig,
    build_loss_config,
    build_loss_module,
    register_loss_config,
)

OURS = ("chunking", "temperature_squared")
FIELDS = {  # NeMo Automodel's, and ours
    MaskedCrossEntropyConfig: {"fp32_upcast": True, "ignore_index": -100, "reduction": "sum"},
    FusedLinearCEConfig: {
        "ignore_index": -100,
        "logit_softcapping": 0.0,
        "reduction": "sum",
        "impl": "cce",
        "chunking": Chunking(),
    },
    ChunkedCEConfig: {"chunk_len": 512, "compile": True, "ignore_index": -100, "reduction": "sum"},
    TEParallelCEConfig: {"ignore_index": -100, "reduction": "sum", "tp_group": None},
    KDLossConfig: {
        "ignore_index": -100,
        "temperature": 1.0,
        "fp32_upcast": True,
        "tp_group": None,
        "chunk_size": 0,
        "temperature_squared": True,
    },
    MTPLossConfig: {"scaling_factor": None, "ignore_index": None},
}
LOSSES = list(LOSS_CONFIG_REGISTRY.values())
# A value other than the default for every field.
CHANGED = {"fp32_upcast": False, "ignore_index": 7, "reduction": "none", "logit_softcapping": 5.0, "tp_group": None}
CHANGED |= {
    "logit_scale": 0.25,
    "teacher_softcap": 3.0,
    "teacher_logit_scale": 1.5,
    "temperature": 0.5,
    "chunk_size": 3,
    "label_smoothing": 0.1,
    "z_loss": 0.01,
    "softcap": 2.0,
    "shift": 1,
}
CHANGED |= {"impl": "torch_compile", "chunk_len": 7, "compile": False}
CHANGED |= {"class_dim": 1, "jsd_weight": 0.2, "hard_label_weight": 0.3, "scaling_factor": 0.7}
CHANGED |= {"divergence": {"jsd": 0.3, "lk": 0.5}, "lk_decay": 2.0, "temperature_squared": False}
CHANGED |= {"importance": "sequence", "clip_low": 0.1, "clip_high": 0.3, "kl": "k2", "kl_coefficient": 0.1}
CHANGED |= {"temperature_positive": 1.5, "temperature_negative": 2.0, "entropy_coefficient": 0.01}
CHANGED |= {"beta": 0.3, "margin": 0.5, "length_normalised": True, "f_divergence": "js", "alpha": 0.7}
CHANGED |= {"sft_coefficient": 1.0, "desirable_weight": 2.0, "undesirable_weight": 0.5, "center_coefficient": 0.1}
CHANGED |= {"chunking": Chunking(chunk_size=5, accumulate_dtype=torch.float64, compile=False)}
# Names of kinds differ, and options go with some of them alone.
OF_KINDS = {
    "Policy": {"kind": "sapo", "dual_clip": None},
    "Preference": {"kind": "robust"},
    "KTO": {"kind": "apo_zero_unpaired"},
}


def changed_of(config):
    """What differs from the defaults of a config."""
    own = {name: v for word, kinds in OF_KINDS.items() if word in config.__name__ for name, v in kinds.items()}
    return {name: {**CHANGED, **own}[name] for name in names(config)}


def names(config):
    return [f.name for f in dataclasses.fields(config)]


@pytest.mark.parametrize("config", FIELDS)
def test_fields_and_defaults(config):
    assert vars(config()) == FIELDS[config]
    assert list(inspect.signature(config).parameters) == list(FIELDS[config])
    positional = [value for name, value in FIELDS[config].items() if name not in OURS]
    assert config(*positional) == config()


@pytest.mark.parametrize("config", LOSSES)
def test_build(config):
    module = config.module
    assert module is getattr(compiled_loss, module.__name__, None) or module is getattr(
        compiled_loss.nn, module.__name__
    )
    assert build_loss_config(module.__name__) == build_loss_config(module) == config()
    changed = changed_of(config)
    made = config(**changed).build()
    assert type(made) is module
    assert {name: getattr(made, name) for name in changed} == changed


@pytest.mark.parametrize("config", [*LOSSES, MTPLossConfig])
def test_round_trip(config):
    """Plain values, `Chunking` included, that make an equal config and so an equal loss; by each door."""
    for one in (config(), config(**changed_of(config))):
        plain = one.to_dict()
        assert plain.keys() == {*names(config)} - {"tp_group"}
        for written in (json.loads(json.dumps(plain)), yaml.safe_load(yaml.safe_dump(plain))):
            assert config.from_dict(written) == config(**written) == one
            if config is not MTPLossConfig:
                assert build_loss_config(config.module.__name__, **written) == one
                assert build_loss_config(config.module, **written) == one
                made = build_loss_module(config.module.__name__, **written)
                assert repr(made) == repr(one.build())
                assert vars(one).items() <= {name: getattr(made, name) for name in names(config)}.items()


@pytest.mark.parametrize("config", [c for c in LOSSES if "chunking" in names(c)])
def test_a_chunking_that_is_none(config):
    with pytest.raises(TypeError, match=r"^Chunking: expected only strategy, chunk_size, .*, got size$"):
        config.from_dict({"chunking": {"size": 4}})
    with pytest.raises(TypeError, match=r"^chunking: expected a Chunking, got int"):
        config(chunking=4)
    with pytest.raises(TypeError, match=r"^accumulate_dtype: expected a floating torch.dtype or None, got 'half!'"):
        config.from_dict({"chunking": {"accumulate_dtype": "half!"}})


@pytest.mark.parametrize("config", LOSSES)
def test_an_unknown_keyword_is_refused_alike_at_every_door(config):
    """With the class, the keyword, those that exist, and the one that was meant."""
    meant = "ignore_index" if "ignore_index" in names(config) else names(config)[-1]
    typo = meant[:-2] + meant[-1]
    known = ", ".join(names(config))
    module = config.module
    for door in (
        partial(config, **{typo: 1}),
        partial(config.from_dict, yaml.safe_load(f"{typo}: 1")),
        partial(build_loss_config, module.__name__, **{typo: 1}),
        partial(build_loss_config, module, **{typo: 1}),
        partial(build_loss_module, module, **{typo: 1}),
    ):
        text = f"{config.__name__}: expected only {known}, got {typo}: did you mean {meant}?"
        with pytest.raises(TypeError, match="^" + re.escape(text) + "$"):
            door()
    known = ", ".join(inspect.signature(module).parameters)
    text = f"{module.__name__}: expected only {known}, got {typo}: did you mean {meant}?"
    with pytest.raises(TypeError, match="^" + re.escape(text) + "$"):
        module(**{typo: 1})


def test_a_keyword_of_another_place_is_refused_with_the_place():
    weights = torch.ones(3)
    for door in (build_loss_config, build_loss_module):
        with pytest.raises(TypeError, match=r": class_weights is set on the CrossEntropy that is built$"):
            door(compiled_loss.nn.CrossEntropy, class_weights=weights)
    for owner in (compiled_loss.nn.CrossEntropy, CrossEntropyConfig):
        with pytest.raises(TypeError, match=r": mask comes with the call$"):
            owner(mask=None)
    with pytest.raises(TypeError, match=r"got mask, nonsense: mask comes with the call$"):
        build_loss_config("CrossEntropy", mask=None, nonsense=1)
    with pytest.raises(TypeError, match=r"^LossConfig: expected no keywords, got scale$"):
        LossConfig(scale=1)
    built = CrossEntropyConfig(reduction="sum").build()
    built.class_weights = weights * 2
    logits, labels = torch.randn(2, 3), torch.tensor([0, 2])
    expected = compiled_loss.cross_entropy(logits, labels, class_weights=weights * 2, reduction="sum")
    torch.testing.assert_close(built(logits, labels), expected, rtol=0, atol=0)
    assert list(built.state_dict()) == ["class_weights"]


def test_the_type_of_a_config_depends_on_no_keyword():
    for keywords in ({}, {"chunking": Chunking(chunk_size=3)}, {"chunking": {"chunk_size": 3}}):
        for loss in ("FusedLinearCrossEntropy", compiled_loss.FusedLinearCrossEntropy):
            config = build_loss_config(loss, **keywords)
            assert type(config) is FusedLinearCEConfig
            assert config.build().chunking == Chunking(chunk_size=3 if keywords else None)


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


class Scaled(nn.Module):
    def __init__(self, scale=1.0):
        super().__init__()
        self.scale = scale

    @classmethod
    def doubled(cls, scale):
        return cls(2 * scale)


def local_factories():
    class Local(Scaled): ...

    return [Local, lambda scale: Scaled(2 * scale), partial(Scaled)]


@pytest.mark.parametrize("factory", [Scaled, Scaled.doubled, nn.CrossEntropyLoss, dataclasses.make_dataclass])
def test_a_factory_is_written_by_its_name(factory):
    one = LossFromFactoryConfig(factory, {"scale": 3.0})
    plain = one.to_dict()
    assert plain == {"factory": f"{factory.__module__}:{factory.__qualname__}", "kwargs": {"scale": 3.0}}
    again = LossFromFactoryConfig.from_dict(yaml.safe_load(yaml.safe_dump(plain)))
    assert again == one
    if factory in (Scaled, Scaled.doubled):
        assert again.build().scale == one.build().scale


@pytest.mark.parametrize("factory", local_factories())
def test_a_factory_without_a_name_stays_as_it_is(factory):
    one = LossFromFactoryConfig(factory, {"scale": 3.0})
    assert one.to_dict() == {"factory": factory, "kwargs": {"scale": 3.0}}
    assert LossFromFactoryConfig.from_dict(one.to_dict()) == one
    assert one.to_dict()["kwargs"] is not one.kwargs


@pytest.mark.parametrize("name", ["nowhere:Loss", "torch.nn:Nothing", "Loss", "a b", ""])
def test_a_factory_that_is_not_found(name):
    with pytest.raises(TypeError, match=f"^factory: expected a callable that returns a loss, got '{name}'"):
        LossFromFactoryConfig.from_dict({"factory": name})


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
