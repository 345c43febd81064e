"""Typed configs of the losses, a registry, and their builders: what a YAML recipe says becomes a Module.

NOTE [Round trip]
`to_dict` gives plain values that JSON and YAML hold, and `from_dict` takes them back. Process groups are made where the
program runs: a config that holds one has no dict, and says so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from torch import nn

from compiled_loss import shell_checks
from compiled_loss.pipeline import PipelineCausalLMLoss
from compiled_loss.shells import FusedLinearCrossEntropy, KDLoss, MaskedCrossEntropy, TEParallelCrossEntropy

_Config = TypeVar("_Config", bound="_Typed")
_RUNTIME = ("tp_group", "factory")


@dataclass
class _Typed:
    """What all configs share. Fields stay assignable, so they are validated on construction and again by `build`."""

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Raise where a field is not what it may be."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values by field name: NOTE [Round trip]."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for name in _RUNTIME:
            shell_checks.no_runtime(type(self).__name__, name, values.pop(name, None))
        return {name: dict(value) if isinstance(value, dict) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls: type[_Config], values: dict[str, Any]) -> _Config:
        """The config of `to_dict`."""
        shell_checks.fields(cls.__name__, values, [f.name for f in dataclasses.fields(cls)])
        return cls(**values)


@dataclass
class LossConfig(_Typed):
    """Base of the loss configs: fields are the keywords of a loss, `build` makes it."""

    module: ClassVar[type[nn.Module] | None] = None

    def validate(self) -> None:
        """Raise where a field is not what it may be: the Module looks."""
        if self.module is not None:
            self._make()

    def build(self) -> nn.Module:
        """The loss."""
        if self.module is None:
            raise NotImplementedError(f"{type(self).__name__}: expected a subclass that overrides build()")
        return self._make()

    def _make(self) -> nn.Module:
        assert self.module is not None
        return self.module(**{f.name: getattr(self, f.name) for f in dataclasses.fields(self)})


@dataclass
class MaskedCrossEntropyConfig(LossConfig):
    """Of `MaskedCrossEntropy`.

    Attributes:
        fp32_upcast: kept for its callers; see :func:`compiled_loss.masked_cross_entropy`.
        ignore_index: label of tokens to ignore.
        reduction: "sum", "mean" or "none".

    """

    module: ClassVar[type[nn.Module] | None] = MaskedCrossEntropy
    fp32_upcast: bool = True
    ignore_index: int = -100
    reduction: str = "sum"


@dataclass
class FusedLinearCEConfig(LossConfig):
    """Of `FusedLinearCrossEntropy`.

    Attributes:
        ignore_index: label of tokens to ignore.
        logit_softcapping: bound of the logits; 0 for none.
        reduction: "sum", "mean" or "none".

    """

    module: ClassVar[type[nn.Module] | None] = FusedLinearCrossEntropy
    ignore_index: int = -100
    logit_softcapping: float = 0.0
    reduction: str = "sum"


@dataclass
class TEParallelCEConfig(LossConfig):
    """Of `TEParallelCrossEntropy`.

    Attributes:
        ignore_index: label of tokens to ignore.
        reduction: "sum", "mean" or "none".
        tp_group: the tensor-parallel process group; given where the program runs.

    """

    module: ClassVar[type[nn.Module] | None] = TEParallelCrossEntropy
    ignore_index: int = -100
    reduction: str = "sum"
    tp_group: Any = None


@dataclass
class KDLossConfig(LossConfig):
    """Of `KDLoss`.

    Attributes:
        ignore_index: label of tokens to ignore.
        temperature: divides both logits, > 0; the loss is multiplied by its square.
        fp32_upcast: kept for its callers; see :func:`compiled_loss.distillation`.
        tp_group: the tensor-parallel process group; given where the program runs.
        chunk_size: kept for its callers, an int >= 0.

    """

    module: ClassVar[type[nn.Module] | None] = KDLoss
    ignore_index: int = -100
    temperature: float = 1.0
    fp32_upcast: bool = True
    tp_group: Any = None
    chunk_size: int = 0


@dataclass
class LossFromFactoryConfig(LossConfig):
    """Of any class or callable that returns a loss.

    Attributes:
        factory: called as factory(**kwargs).
        kwargs: its keyword arguments.

    """

    factory: Callable[..., nn.Module] | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)

    def validate(self) -> None:
        """Raise unless there is something to call."""
        shell_checks.factory(self.factory, self.kwargs)

    def build(self) -> nn.Module:
        """What the factory returns."""
        self.validate()
        assert self.factory is not None
        return self.factory(**self.kwargs)


@dataclass
class MTPLossConfig(_Typed):
    """Of the multi-token prediction that `PipelineCausalLMLoss` adds. No `LossConfig`: it needs a loss and a model.

    Attributes:
        scaling_factor: weight of the auxiliary loss, >= 0; None for the model's own.
        ignore_index: label of tokens to ignore.

    """

    scaling_factor: float | None = None
    ignore_index: int = -100

    def validate(self) -> None:
        """Raise where a field is not what it may be."""
        shell_checks.scaling(self.scaling_factor, self.ignore_index)

    def build(self, loss_fn: nn.Module, model: nn.Module) -> PipelineCausalLMLoss:
        """The loss of a pipeline's last stage."""
        self.validate()
        return PipelineCausalLMLoss(loss_fn, model, scaling_factor=self.scaling_factor, ignore_index=self.ignore_index)


LOSS_CONFIG_REGISTRY: dict[str, type[LossConfig]] = {}
"""Configs by the name of what they build; :func:`register_loss_config` adds to it."""


def register_loss_config(name: str, config: type[LossConfig]) -> None:
    """Make a config known by a name, and by its class `module` where it has one.

    Args:
        name: the key; a name that is taken is refused.
        config: a subclass of :class:`LossConfig`.

    Returns:
        Nothing.

    Memory:
        None.

    Raises:
        ValueError: the name is taken.
        TypeError: it is no such class.

    Example:
        >>> from dataclasses import dataclass
        >>> from compiled_loss import LossConfig, build_loss_module, register_loss_config
        >>> @dataclass
        ... class MineConfig(LossConfig):
        ...     scale: float = 1.0
        ...     def build(self):
        ...         return torch.nn.Identity()
        >>> import torch
        >>> register_loss_config("Mine", MineConfig)
        >>> build_loss_module("Mine", scale=2.0)
        Identity()

    """
    shell_checks.registration(name, config, LossConfig, LOSS_CONFIG_REGISTRY)
    LOSS_CONFIG_REGISTRY[name] = config


for _config in (MaskedCrossEntropyConfig, FusedLinearCEConfig, TEParallelCEConfig, KDLossConfig):
    assert _config.module is not None
    register_loss_config(_config.module.__name__, _config)


def build_loss_config(
    loss: LossConfig | str | Callable[..., nn.Module],
    **loss_kwargs: Any,
) -> LossConfig:
    """The config of a loss that is named in any of four ways.

    Args:
        loss: a config, which is returned as it is; a name of the registry; a registered loss class, by identity and not
            by its name, whose keywords fit its config; or any other class or callable, which is wrapped in a
            :class:`LossFromFactoryConfig`. Dotted paths are the caller's to resolve.
        loss_kwargs: keywords of the loss; none beside a config.

    Returns:
        A :class:`LossConfig`, validated.

    Memory:
        None.

    Raises:
        ValueError: keywords beside a config.
        TypeError: a config class, an `MTPLossConfig`, an unknown name, or nothing that can be called.

    Example:
        >>> from compiled_loss import build_loss_config
        >>> build_loss_config("MaskedCrossEntropy", reduction="mean")
        MaskedCrossEntropyConfig(fp32_upcast=True, ignore_index=-100, reduction='mean')

    """
    if isinstance(loss, LossConfig):
        shell_checks.no_keywords(loss_kwargs)
        return loss
    if isinstance(loss, str) and loss in LOSS_CONFIG_REGISTRY:
        return LOSS_CONFIG_REGISTRY[loss](**loss_kwargs)
    shell_checks.loss_target(loss, _Typed, list(LOSS_CONFIG_REGISTRY))
    assert callable(loss)
    for config in LOSS_CONFIG_REGISTRY.values():
        if config.module is loss and loss_kwargs.keys() <= {f.name for f in dataclasses.fields(config)}:
            return config(**loss_kwargs)
    return LossFromFactoryConfig(factory=loss, kwargs=dict(loss_kwargs))


def build_loss_module(
    loss: LossConfig | str | Callable[..., nn.Module],
    **loss_kwargs: Any,
) -> nn.Module:
    """The loss that `build_loss_config` describes, made.

    Args, Memory, Raises: see :func:`build_loss_config`.

    Returns:
        The Module.

    Example:
        >>> from compiled_loss import KDLoss, build_loss_module
        >>> build_loss_module(KDLoss, temperature=2.0).temperature
        2.0

    """
    return build_loss_config(loss, **loss_kwargs).build()
