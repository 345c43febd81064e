"""The keywords that losses of a linear head's log-probabilities keep."""

from dataclasses import dataclass

from compiled_loss.planner.chunking import Chunking


@dataclass(kw_only=True, eq=False, repr=False)
class HeadOptions:
    """The keywords for labels, logits and chunks of a head."""

    ignore_index: int = -100
    """Label of tokens to ignore."""
    softcap: float | None = None
    """Bound of the scaled logits, > 0; None for none."""
    logit_scale: float = 1.0
    """Multiplies the logits before the softcap, > 0."""
    temperature: float = 1.0
    """Divides the logits, > 0."""
    chunking: Chunking = Chunking()
    """The chunks of the loss. They change speed and memory, and never the result."""


@dataclass(kw_only=True, eq=False, repr=False)
class AnswersHeadOptions(HeadOptions):
    """Options of a head for answers, whose labels may be shifted."""

    shift: int = 0
    """The distance of labels: position t predicts label t + shift."""
