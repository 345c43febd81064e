"""Write the API's pages from the docstrings: python tools/docs.py [folder]. Fails where a reference leads nowhere."""

from __future__ import annotations

import importlib
import re
import sys
import warnings
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urldefrag, urljoin

import pdoc.doc
import pdoc.doc_ast
import pdoc.render

from compiled_loss import Chunking

ROOT = "compiled_loss"
INTEGRATIONS = ("integrations.transformers", "integrations.trl")
FURTHER = ("nn", "huggingface", *INTEGRATIONS, "testing", "inspection", "reference")
PAGES = (ROOT, *(f"{ROOT}.{name}" for name in FURTHER))
GROUPS = {  # of what is imported from the root, by the module that defines it, in the order of its page
    "Losses": (
        "functional.cross_entropy",
        "engine.math.statistics",
        "functional.statistics",
        "functional.ids",
        "functional.token_loss",
        "functional.policy",
        "functional.policy_evaluation",
        "functional.weights",
        "functional.preference",
        "functional.preference_evaluation",
        "functional.kto",
        "functional.kto_evaluation",
        "functional.reward",
        "compat.masked_cross_entropy",
        "functional.distillation",
        "functional.distillation_statistics",
        "functional.soft_cross_entropy",
        "functional.multi_token",
        "planner.chunking",
        "planner.explain",
    ),
    "Sharded vocabularies": ("distributed.vocab_shard",),
    "Modules": ("compat.modules",),
    "Configs": ("config.base", "config.losses", "config.registry"),
    "Pipelines": ("compat.calculate", "compat.pipeline"),
}
NOTE = re.compile(r"NOTE \[([^\]]+)\]")
ROLE = re.compile(r":(\w+):`([^`]+)`")
WRAPPED = re.compile(r"^( +\w[\w, ]*,)\n +(?=\w[\w, ]*:)", re.M)  # names of arguments that share an entry


def pages() -> dict[str, pdoc.doc.Module]:
    """Each page, by the module that a reader imports from."""
    made = {name: page(name) for name in PAGES}
    root = made[ROOT]
    if left := [member.name for member in root.members.values() if group_of(member) is None]:
        sys.exit(f"no group of tools/docs.py holds {', '.join(left)}")
    groups = {title: sorted((m for m in root.members.values() if group_of(m) == title), key=place) for title in GROUPS}
    root.members = {m.name: m for group in groups.values() for m in group}
    root.submodules = [made[name] for name in PAGES[1:]]
    sections = [*groups.items(), ("Further modules", root.submodules)]
    root.docstring += "".join(f"\n\n## {title}\n\n{contents(members)}" for title, members in sections)
    return made


def page(name: str) -> pdoc.doc.Module:
    """What a module exports, without fields that say nothing, and with the notes that docstrings cite."""
    module = pdoc.doc.Module(importlib.import_module(name))
    for variable in module.variables:
        describe(variable)
    for cls in module.classes:
        if issubclass(cls.obj, tuple):  # pdoc looks a NamedTuple's annotations up where __new__ says it is from
            cls.obj.__new__.__module__ = cls.obj.__module__
        cls.members = {key: member for key, member in cls.members.items() if not silent(member)}
        if "__init__" in cls.members:  # its docstring is inherited: the class's own describes the arguments
            cls.members["__init__"].docstring = ""
        hidden = [base.__qualname__ for base in cls.obj.__mro__ if is_hidden(base)]
        cls.bases = [base for base in cls.bases if base[1] not in hidden]
        for member in cls.members.values():
            if member.taken_from[1].rpartition(".")[0] in hidden:  # what a hidden base gives is the class's own
                member.taken_from = (cls.modulename, member.qualname)
    for member in documented(module):
        member.docstring = WRAPPED.sub(r"\1 ", member.docstring)
        member.docstring += "".join(note(cited, member.obj.__module__) for cited in NOTE.findall(member.docstring))
    return module


def is_hidden(cls: type) -> bool:
    """Whether a base class is ours and on no page."""
    return cls.__module__.startswith(ROOT) and all(
        getattr(sys.modules[page], cls.__name__, None) is not cls for page in PAGES
    )


def describe(variable: pdoc.doc.Variable) -> None:
    """Take the docstring below an assignment from the module of the assignment, which others import it from."""
    for name in [n for n in sys.modules if n.startswith(f"{ROOT}.") and hasattr(sys.modules[n], variable.name)]:
        if text := pdoc.doc_ast.walk_tree(sys.modules[name]).var_docstrings.get(variable.name):
            variable.docstring, variable.taken_from = text, (name, variable.name)


def silent(member: pdoc.doc.Doc) -> bool:
    """Whether it is a field without a docstring of its own: its class describes it."""
    text = member.docstring
    return isinstance(member, pdoc.doc.Variable) and (not text or text.startswith("Alias for field"))


def documented(module: pdoc.doc.Module) -> Iterator[pdoc.doc.Doc]:
    """All that a page shows."""
    for member in module.members.values():
        yield member
        if isinstance(member, pdoc.doc.Class):
            yield from member.own_members


def note(cited: str, module: str) -> str:
    """The NOTE of a module's docstring, as a section to put below the docstring that cites it."""
    parts = NOTE.split(sys.modules[module].__doc__ or "")[1:]
    found = dict(zip(parts[::2], parts[1::2], strict=True))
    if cited not in found:
        sys.exit(f"the note {cited!r} is cited, and not in the docstring of {module}")
    return f"\n\n###### Note: {cited}\n\n{found[cited].strip()}"


def group_of(member: pdoc.doc.Doc) -> str | None:
    module = member.taken_from[0].removeprefix(f"{ROOT}.")
    return next((title for title, modules in GROUPS.items() if module in modules), None)


def place(member: pdoc.doc.Doc) -> tuple[int, bool, int]:
    """By module, functions first, then as in the source."""
    module = member.taken_from[0].removeprefix(f"{ROOT}.")
    line = member.source_lines[0] if member.source_lines else 0
    return [m for modules in GROUPS.values() for m in modules].index(module), member.kind != "function", line


def contents(members: list[pdoc.doc.Doc]) -> str:
    """Names, and the first sentence of each."""
    lines = []
    for member in members:
        first = re.split(r"(?<=\.)\s|\n\n", member.docstring, maxsplit=1)[0]
        lines.append(f"- `{member.fullname if member.kind == 'module' else member.name}`: {' '.join(first.split())}")
    return "\n".join(lines)


class Html(HTMLParser):
    """What of a page can be linked to, what it links to, and its prose; code blocks are none of these."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.prose: list[str] = []
        self.feed(re.sub(r"<(pre|style|script)\b.*?</\1>", "", text, flags=re.S))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.ids.add(given.get("id") or "")
        if tag == "a":
            self.links.append(given.get("href") or "")

    def handle_data(self, data: str) -> None:
        self.prose.append(data)


def broken(files: dict[str, str], roles: dict[str, set[tuple[str, str]]]) -> list[str]:
    """What leads nowhere: each file's `roles`, (kind, name), that are no link, and links without a target."""
    read = {path: Html(text) for path, text in files.items()}
    found = []
    for path, html in read.items():
        for kind, name in sorted(roles.get(path, ())):
            if f"<code>{name}{'()' if kind in ('func', 'meth') else ''}</code>" in files[path]:
                found.append(f"{path}: :{kind}:`{name}` is on no page")
        found += [f"{path}: {role} is not understood" for role in re.findall(r":[a-z]+:`?", "".join(html.prose))]
        for link in html.links:
            target, fragment = urldefrag(urljoin(path, link))
            if ":" not in target and (target not in read or (fragment and fragment not in read[target].ids)):
                found.append(f"{path}: {link} leads nowhere")
    return found


def write(folder: Path) -> list[str]:
    """Write the pages; what is broken."""
    pdoc.render.configure(docformat="google", footer_text=f"{ROOT} {importlib.import_module(ROOT).__version__}")
    made = pages()
    files, roles = {"index.html": pdoc.render.html_index(made)}, {}
    for name, module in made.items():
        path = f"{name.replace('.', '/')}.html"
        files[path] = pdoc.render.html_module(module, made)
        roles[path] = {role for member in documented(module) for role in ROLE.findall(member.docstring)}
    for path, text in [*files.items(), ("search.js", pdoc.render.search_index(made))]:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text, encoding="utf-8")
    return broken(files, roles)


if __name__ == "__main__":
    for page_name in PAGES:
        importlib.import_module(page_name)
    Chunking.__repr__ = lambda self: "Chunking()"  # as it stands in the signatures
    warnings.simplefilter("error")  # pdoc's, where it cannot make sense of something
    output = Path(sys.argv[1] if len(sys.argv) > 1 else "build/docs")
    if wrong := write(output):
        sys.exit("\n".join(wrong))
    print(output / "index.html")
