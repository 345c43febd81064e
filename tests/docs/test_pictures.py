"""Pictures are read on light pages, on dark ones, and in any viewer: contrast as WCAG 2.2 computes it."""

import importlib
import re
import runpy
from functools import partial
from pathlib import Path

import pages
import pytest
from made_inspections import EVERY

from benches import plot
from compiled_loss.pictures import COLORS, DARK, LIGHT, dark, write

colors = pytest.importorskip("matplotlib.colors")
image = pytest.importorskip("PIL.Image")

PICTURES = sorted(path.name for path in (pages.ROOT / "docs").glob("*.png") if not path.stem.endswith("-dark"))
GITHUB = "#0d1117"  # its dark page
TEXT, LINE = 4.5, 3.0  # what WCAG asks for: 1.4.3 and 1.4.11
SHOWN = re.compile(
    r'^<picture>\n  <source media="\(prefers-color-scheme: dark\)" srcset="(?P<dark>[\w/-]+\.png)">\n'
    r'  <img alt="(?P<alt>[^"]+)"\s+src="(?P<light>[\w/-]+\.png)">\n</picture>$',
    re.MULTILINE,
)


def luminance(color):
    linear = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colors.to_rgb(color))
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one, another):
    darker, lighter = sorted((luminance(one), luminance(another)))
    return (lighter + 0.05) / (darker + 0.05)


def test_contrast():
    assert contrast("black", "white") == pytest.approx(21)
    assert contrast("#777777", "white") == pytest.approx(4.48, abs=0.005)  # as WebAIM's checker has it


@pytest.mark.parametrize("color", COLORS)
def test_lines_are_seen_on_every_page(color):
    assert min(contrast(color, page) for page in (LIGHT.background, DARK.background, GITHUB)) >= LINE


def test_text_is_read_on_its_page():
    for page in (LIGHT, DARK):
        assert contrast(page.text, page.background) >= TEXT


@pytest.mark.parametrize(("page", "most"), [(DARK.background, 4.29), (GITHUB, 4.35)])
def test_no_text_is_read_on_both_pages(page, most):
    """Contrasts with both are equal where luminance + 0.05 is the pages' geometric mean; elsewhere one is less."""
    best = contrast(page, "white") ** 0.5
    assert best == pytest.approx(most, abs=0.005)
    assert best < TEXT  # else one file would do


def test_the_dark_page_is_that_of_the_site():
    furo = pytest.importorskip("furo")
    (style,) = Path(furo.__file__).parent.rglob("styles/furo.css")
    backgrounds = set(re.findall(r"--color-background-primary:([^;}]+)", style.read_text()))
    assert backgrounds == {"#fff", DARK.background}


# What is drawn -------------------------------------------------------------------------------------------------------


def draw_inspections(path, _monkeypatch):
    pytest.importorskip("rich")
    from compiled_loss.inspection.picture import plot

    plot(list(EVERY.values()), path)
    plot([], path)


def draw_demo(path, _monkeypatch):
    pytest.importorskip("rich")
    from compiled_loss.demo.picture import draw
    from compiled_loss.demo.report import Run

    draw(Run("ordinary", [3.0, 2.0], peak=2**28), Run("ours", [3.0, 2.0], peak=2**26), "a demo", path)
    draw(Run("ordinary", [3.0]), Run("ours"), "interrupted", path)


def draw_benches(path, monkeypatch):
    monkeypatch.setattr(plot, "PICTURE", path)
    plot.draw()


def draw_scaling(path, monkeypatch):
    monkeypatch.syspath_prepend(pages.ROOT / "tools")
    scaling = importlib.import_module("scaling")
    monkeypatch.setattr(scaling, "PICTURE", path)
    scaling.draw()


def draw_dpo(path, _monkeypatch):
    draw_example("dpo", path, "chosen", "rejected", "margin", "accuracy", "loss")


def draw_grpo(path, _monkeypatch):
    draw_example("grpo", path, "reward", "KL to the reference", "clipped", "entropy")


def draw_example(name, path, *keys):
    picture = runpy.run_path(str(pages.ROOT / "examples" / f"{name}.py"))["picture"]
    write(partial(picture, [dict.fromkeys(keys, step / 2) for step in range(3)]), path)


@pytest.mark.parametrize("draw", [draw_inspections, draw_demo, draw_benches, draw_scaling, draw_dpo, draw_grpo])
def test_everything_drawn_has_contrast(tmp_path, monkeypatch, draw):
    """Texts and lines against their figure's background. The grid is exempt: it repeats the labels of the ticks."""
    from matplotlib.collections import EventCollection, PathCollection
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import StepPatch
    from matplotlib.spines import Spine
    from matplotlib.text import Text

    figures, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda *given, **options: figures.append(given[0]) or save(*given, **options)
    )
    draw(tmp_path / "memory.png", monkeypatch)
    assert len(figures) >= 2
    for i, figure in enumerate(figures):
        background = (LIGHT, DARK)[i % 2].background
        for part in (figure, *figure.axes):
            assert colors.to_hex(part.get_facecolor()) == background
        texts = [text for text in figure.findobj(Text) if text.get_text()]
        assert len(texts) > 5
        assert min(contrast(text.get_color(), background) for text in texts) >= TEXT
        axes = [one for part in figure.axes for one in (part.xaxis, part.yaxis)]
        grid = {tick.gridline for one in axes for tick in (*one.get_major_ticks(), *one.get_minor_ticks())}
        found = [line.get_color() for line in figure.findobj(Line2D) if line not in grid]
        for kind in (EventCollection, PathCollection, Spine):
            found += [color for part in figure.findobj(kind) for color in colors.to_rgba_array(part.get_edgecolor())]
        found += [part.get_edgecolor() for part in figure.findobj(StepPatch) if not part.get_fill()]
        assert min(contrast(color[:3] if len(color) == 4 else color, background) for color in found) >= LINE
    for page, file in zip((LIGHT, DARK), (tmp_path / "memory.png", tmp_path / "memory-dark.png"), strict=True):
        size_of_opaque(file, page)


def size_of_opaque(file, page):
    """Check that a viewer's own background, be it white or black, is nowhere seen through the picture."""
    picture = image.open(file).convert("RGBA")
    assert picture.getchannel("A").getextrema() == (255, 255)
    right, bottom = (side - 1 for side in picture.size)
    corners = {picture.getpixel(corner)[:3] for corner in ((0, 0), (right, 0), (0, bottom), (right, bottom))}
    assert {f"#{red:02x}{green:02x}{blue:02x}" for red, green, blue in corners} == {page.background}
    return picture.size


# What is committed ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PICTURES)
def test_committed_pictures_have_a_partner(name):
    file = pages.ROOT / "docs" / name
    assert size_of_opaque(file, LIGHT) == size_of_opaque(dark(file), DARK)


def test_no_partner_is_alone():
    partners = {dark(Path(name)).name for name in PICTURES}
    assert {path.name for path in (pages.ROOT / "docs").glob("*.png")} == {*PICTURES, *partners}


def test_pages_show_both_of_each_picture():
    found = []
    for page in pages.PAGES:
        text = pages.read(page)
        shown = list(SHOWN.finditer(text))
        assert sorted(re.findall(r"[\w/-]+\.png(?=[\")>])", text)) == sorted(
            m[g] for m in shown for g in ("light", "dark")
        )
        for match in shown:
            light = (pages.ROOT / page).parent / match["light"]
            assert (pages.ROOT / page).parent / match["dark"] == dark(light)
            assert light.is_file()
            found.append(light.name)
    assert sorted(found) == list(PICTURES)
