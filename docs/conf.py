"""How Sphinx builds the site: `make docs`. The network is not used, and every warning is an error."""

import re
import sys
from pathlib import PurePath

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

import compiled_loss

project = "compiled_loss"
release = version = compiled_loss.__version__
project_copyright = "the compiled_loss authors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]

html_theme = "furo"
html_title = f"{project} {release}"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
html_show_sourcelink = False

myst_heading_anchors = 3
autodoc_mock_imports = ["axolotl", "nemo_automodel", "spmd_types", "torchtitan"]  # which pin another torch
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_use_type_comments = False
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Memory", "notes_style"), ("Source", "notes_style")]
default_role = "literal"
add_module_names = False
python_maximum_signature_line_length = 100
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!compiled_loss|:).*")]  # torch's pages are not read: that needs a network

WRAPPED = re.compile(r"^( +\w[\w, ]*,)\n +(?=\w[\w, ]*:)", re.MULTILINE)  # names of arguments that share an entry
PICTURE = re.compile(
    r'<picture>\s*<source media="\(prefers-color-scheme: dark\)" srcset="(?P<dark>[^"]+)">'
    r'\s*<img alt="(?P<alt>[^"]+)"\s+src="(?P<light>[^"]+)">\s*</picture>\s*'
)
NOTE = re.compile(r"NOTE \[([^\]]+)\]")


def notes(text: str, module: str) -> list[str]:
    """The lines of each NOTE that a docstring cites, which stands in the docstring of its module."""
    parts = NOTE.split(sys.modules[module].__doc__ or "")[1:]
    found = dict(zip(parts[::2], parts[1::2], strict=True))
    lines = []
    for name in NOTE.findall(text):
        lines += ["", f".. rubric:: {name}", "", *found[name].strip().splitlines()]
    return lines


def formulas(lines: list[str]) -> list[str]:
    """The lines, with every indented block that follows a paragraph as a literal block."""
    found: list[str] = []
    for i, line in enumerate(lines):
        found.append(line)
        if (
            line[:1].strip()
            and lines[i + 1 : i + 2] == [""]
            and lines[i + 2 : i + 3]
            and lines[i + 2].startswith("    ")
        ):
            found += ["", "::"]
    return found


def read_docstring(_app: Sphinx, what: str, _name: str, value: object, _options: object, lines: list[str]) -> None:
    module = getattr(value, "__module__", None)
    if what != "module" and module in sys.modules:
        lines += notes("\n".join(lines), module)
    text = "\n".join(lines)
    while (joined := WRAPPED.sub(r"\1 ", text)) != text:
        text = joined
    lines[:] = formulas(text.split("\n"))


def show_pictures(_app: Sphinx, document: nodes.document) -> None:
    """Make each <picture> two images of docs/, of which Furo shows the one for its theme.

    A <picture> itself, which GitHub shows, would follow the browser's preference and not the switch of the page.
    """
    for raw in list(document.findall(nodes.raw)):
        if found := PICTURE.fullmatch(raw.astext()):
            raw.replace_self(
                [
                    nodes.image(uri=f"/{PurePath(found[theme]).name}", alt=found["alt"], classes=[f"only-{theme}"])
                    for theme in ("light", "dark")
                ]
            )


def skip(_app: Sphinx, _what: str, _name: str, value: object, _skipped: bool, _options: object) -> bool | None:
    """A NamedTuple's field that says nothing: its class describes it. None leaves the choice to others."""
    return True if (getattr(value, "__doc__", None) or "").startswith("Alias for field number") else None


def resolve(app: Sphinx, env: BuildEnvironment, node: pending_xref, content: nodes.Element) -> nodes.Element | None:
    """A name that a docstring cites as it is imported from the root."""
    python, name = env.domains.python_domain, f"compiled_loss.{node['reftarget']}"
    if node["refdomain"] != "py" or name not in python.objects:
        return None
    return python.resolve_xref(env, node["refdoc"], app.builder, "obj", name, node, content)


def setup(app: Sphinx) -> None:
    app.connect("autodoc-process-docstring", read_docstring, priority=400)  # before napoleon
    app.connect("autodoc-skip-member", skip)
    app.connect("doctree-read", show_pictures, priority=400)  # before Sphinx collects the images
    app.connect("missing-reference", resolve)
