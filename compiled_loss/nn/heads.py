"""The keywords that losses of a linear head's log-probabilities keep."""

from dataclasses import dataclass

from compiled_loss.planner.chunking import Chunking


@dataclass(kw_only=True, eq=False, repr=False)
class HeadOptions:
    """How labels, logits and chunks are read."""

    ignore_index: int = -100
    """Label of tokens to ignore."""
    softcap: float | None = None
    """Bound of the scaled logits, > 0; None for none."""
    logit_scale: float = 1.0
    """Multiplies the logits before the softcap, > 0."""
    temperature: float = 1.0
    """Divides the logits, > 0."""
    chunking: Chunking = Chunking()
    """How the loss is chunked, which does not change what it is."""


@dataclass(kw_only=True, eq=False, repr=False)
class AnswersHeadOptions(HeadOptions):
    """Options of a head for answers, whose labels may be shifted."""

    shift: int = 0
    """How far ahead labels are: position t predicts label t + shift."""
