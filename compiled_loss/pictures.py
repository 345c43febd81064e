"""Every picture is two files, NAME.png for light pages and NAME-dark.png for dark ones.

NOTE [Two files]
WCAG asks for a contrast of 4.5 between text and its background. No colour has that against white and
against a dark page at once: the most is 4.29 with Furo's #131416, and 4.35 with GitHub's #0d1117. So text has a colour
per page. Both files are opaque, so that a viewer's own background does not matter. Lines need 3.0, and one set of
colours has that on both pages. The grid is fainter, because the labels of the ticks say the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, slots=True)
class Page:
    """The colours of a page and of its text."""

    background: str
    text: str


LIGHT, DARK = Page("#ffffff", "#1f2328"), Page("#131416", "#cfd0d0")  # the dark one is Furo's
BLUE, ORANGE, GREEN, PURPLE = "#1f77b4", "#e0670a", "#009e73", "#9467bd"
GOLD, GREY, RED, BROWN = "#b8860b", "#7f7f7f", "#d62728", "#a0603a"
COLORS = (BLUE, ORANGE, GREEN, PURPLE, GOLD, GREY, RED, BROWN)


def dark(path: Path) -> Path:
    """Returns where the partner for dark pages of the picture at `path` is."""
    return path.with_stem(f"{path.stem}-dark")


def write(draw: Callable[[], Figure], path: Path, **options: Any) -> None:
    """Writes the figure that `draw` makes as a PNG at `path`, and again at `dark(path)`; options are of savefig."""
    from matplotlib import rc_context

    for page, file in ((LIGHT, path), (DARK, dark(path))):
        with rc_context(style(page)):
            draw().savefig(file, format="png", **options)


def style(page: Page) -> dict[Any, Any]:
    """Makes matplotlib's settings for a page."""
    from cycler import cycler

    texts = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    backgrounds = ("figure.facecolor", "axes.facecolor", "savefig.facecolor")
    return {
        **dict.fromkeys(texts, page.text),
        **dict.fromkeys(backgrounds, page.background),
        "axes.prop_cycle": cycler(color=COLORS),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.color": GREY,
        "grid.alpha": 0.2,
        "legend.frameon": False,
    }
