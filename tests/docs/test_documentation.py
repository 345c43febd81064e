"""Documentation is run, complete, and points at things that exist."""

import ast
import dataclasses
import doctest
import importlib
import inspect
import itertools
import pkgutil
import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import torch

import compiled_loss

ROOT = Path(__file__).parents[2]
MODULES = ["compiled_loss", *(m.name for m in pkgutil.walk_packages(compiled_loss.__path__, "compiled_loss."))]
WITH_EXTRAS = (
    "compiled_loss.demo",
    "compiled_loss.cli",
    "compiled_loss.integrations.automodel",
    "compiled_loss.integrations.axolotl",
    "compiled_loss.integrations.lightning",
    "compiled_loss.integrations.torchtitan",
)
FUNCTIONS = {name: f for name in compiled_loss.__all__ if inspect.isfunction(f := getattr(compiled_loss, name))}


def module_of(name):
    try:
        return importlib.import_module(name)
    except ImportError:
        if name.startswith(WITH_EXTRAS):
            pytest.skip("its extras are not installed")
        raise


def public(module):
    """(name, object) of each public function, class, and method or property that the module itself defines."""
    for name, value in vars(module).items():
        if name.startswith("_") or getattr(value, "__module__", None) != module.__name__:
            continue
        if inspect.isfunction(value) or inspect.isclass(value):
            yield name, value
        if inspect.isclass(value):
            for method, member in vars(value).items():
                if not method.startswith("_") and (inspect.isroutine(member) or isinstance(member, property)):
                    yield f"{name}.{method}", member


# Examples -----------------------------------------------------------------------------------------------------------


def failures(test):
    """What doctest says of the examples of one docstring that fail. Dynamo tidies up in their globals later."""
    said = []
    doctest.DocTestRunner(verbose=False).run(test, out=said.append, clear_globs=False)
    return "".join(said)


@pytest.fixture
def _no_code_generation(monkeypatch):
    """Inductor stops after the partition, which is all that examples look at: g++ would take ten seconds."""
    from torch._functorch.aot_autograd import make_boxed_func
    from torch._inductor import compile_fx

    monkeypatch.setattr(compile_fx, "compile_fx_inner", lambda module, inputs, **keywords: make_boxed_func(module))


@pytest.mark.usefixtures("_no_code_generation")
@pytest.mark.parametrize("name", MODULES)
def test_doctests(name):
    before = dict(vars(torch._tensor_str.PRINT_OPTS))
    said = [failures(test) for test in doctest.DocTestFinder().find(module_of(name)) if test.examples]
    assert not any(said), "".join(said)
    assert vars(torch._tensor_str.PRINT_OPTS) == before


def test_doctests_are_found():
    """None is skipped, and a wrong one fails."""

    def wrong():
        """
        >>> 1 + 1
        3
        """

    (test,) = doctest.DocTestFinder().find(wrong, "wrong")
    assert "Expected:\n    3\nGot:\n    2" in failures(test)
    for name in MODULES:
        if not name.startswith(WITH_EXTRAS):
            assert "+SKIP" not in inspect.getsource(importlib.import_module(name))


# Docstrings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODULES)
def test_everything_public_has_a_docstring(name):
    module = module_of(name)
    assert module.__doc__
    demo = name.startswith("compiled_loss.demo")  # an application: its classes explain their methods
    assert not [which for which, value in public(module) if not inspect.getdoc(value) and not (demo and "." in which)]


CLAUSE = re.compile(r"(What|Whether|How|Where|Which|Who|Whose|Whom|When|Of|Beside|As|Then|Without|With|From)\b")


def docstrings(source):
    """(line, text) of each docstring: of modules, classes and functions, and those below a field or a name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            for statement in node.body:
                if isinstance(statement, ast.Expr) and isinstance(getattr(statement.value, "value", None), str):
                    yield statement.lineno, statement.value.value.strip()


def test_docstrings_begin_as_sentences():
    """Or as a name for a thing. "Whether sizes differ." is neither: the function "returns True if sizes differ"."""
    paths = sorted(Path(compiled_loss.__path__[0]).rglob("*.py"))
    found = [(path.name, *one) for path in paths for one in docstrings(path.read_text(encoding="utf-8"))]
    assert len(found) > 1000
    assert [(name, line, text) for name, line, text in found if CLAUSE.match(text)] == []


def test_clauses_are_found():
    source = '"""Whole."""\nx = 1\n"""Which of them."""\nclass A:\n    y: int\n    """How far."""\n'
    source += '    def f():\n        """Whether."""\n        g()\n'
    assert [line for line, text in docstrings(source) if CLAUSE.match(text)] == [3, 6, 8]


def described(cls):
    """The fields of a class that have a docstring of their own, below them."""
    if cls.__module__ == "builtins":
        return set()
    (definition,) = ast.parse(inspect.getsource(cls)).body
    return {
        field.target.id
        for field, below in itertools.pairwise(definition.body)
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr)
    }


@pytest.mark.parametrize("name", compiled_loss.__all__)
def test_each_exported_name_is_documented_by_itself(name):
    """A dataclass or a NamedTuple without a docstring is given one that says nothing: its signature."""
    value = getattr(compiled_loss, name)
    text = value.__doc__.strip()
    assert not text.startswith((f"{name}(", "Alias for"))
    if inspect.isclass(value):
        fields = getattr(value, "_fields", ())
        if dataclasses.is_dataclass(value):
            fields = [f.name for f in dataclasses.fields(value) if f.init]
            fields = [f for f in fields if not any(f in described(base) for base in value.__mro__)]
        if name != "LossAndStatistics":  # its docstring names them in other words
            assert [f for f in fields if f"`{f}`" not in text and f"\n        {f}: " not in text] == []


SECTION = re.compile(r"^(\w[\w, ]*): *(.*)$")


def sections(function):
    """{"Args": text, ...}: a heading is a line that is not indented and ends in a colon, or points elsewhere."""
    found, current = {}, []
    for line in inspect.cleandoc(function.__doc__).splitlines():
        if match := SECTION.match(line):
            heading, rest = match.groups()
            if rest and not rest.startswith("see :func:"):
                continue
            current = heading.split(", ")
            found.update(dict.fromkeys(current, rest))
        else:
            found.update({name: f"{found[name]}\n{line}" for name in current})
    return found


def resolved(function, section):
    """The section's text, from the function that it points to where it does."""
    text = sections(function).get(section, "")
    pointer = re.match(r"see :func:`(\w+)`\.?\s*$", text)
    return resolved(FUNCTIONS[pointer.group(1)], section) if pointer else text


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("section", ["Args", "Returns", "Memory", "Raises", "Example"])
def test_sections(name, section):
    if (name, section) == ("cross_entropy", "Memory"):
        assert "[N, V]" in resolved(FUNCTIONS[name], section)
    text = resolved(FUNCTIONS[name], section).strip()
    assert text
    if section == "Example":
        assert ">>>" in text
        assert name in text
        assert resolved(FUNCTIONS[name], section) == sections(FUNCTIONS[name])[section]  # its own, not another's
    if section == "Raises":
        assert {"ValueError", "TypeError"} <= set(re.findall(r"^ +(\w+):", text, re.MULTILINE)) | set(
            re.findall(r"^(\w+):", text)
        )


def documented(function):
    """Parameters that Args names at the start of an entry: "name: ...", "name, name: ...", over lines."""
    entries = re.split(r"\n {4}(?=\w)", "\n" + resolved(function, "Args").strip("\n"))
    return [n.strip() for entry in entries if ":" in entry for n in entry.split(":")[0].split(",")]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_parameter_is_documented(name):
    assert sorted(documented(FUNCTIONS[name])) == sorted(inspect.signature(FUNCTIONS[name]).parameters)


def test_docstring_reader():
    def function(some, other, third, fourth):
        """Do it: this is no section.

        Args:
            some: a thing, in two
                lines: with a colon.
            other, third,
                fourth: the rest.

        Returns:
            nothing
        """

    assert documented(function) == ["some", "other", "third", "fourth"]
    assert list(sections(function)) == ["Args", "Returns"]
    assert resolved(function, "Memory") == ""


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_tensor_has_its_shape_beside_it(name):
    """In the signature, as a comment: what a reader of the code sees first."""
    source = inspect.getsource(FUNCTIONS[name])
    source = source[: source.index(") ->")]
    for parameter in ("logits", "hidden", "weight", "labels", "bias", "class_weights"):
        if parameter in inspect.signature(FUNCTIONS[name]).parameters:
            assert re.search(
                rf"^ +{parameter}: (Tensor[^#\n]*# |Sequence\[Tensor\],  # D of )\[.*\]$", source, re.MULTILINE
            ), parameter


# The repository -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tracked():
    """{path: text} of the repository's own source and prose."""
    try:
        run = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    paths = (ROOT / name for name in run.stdout.split("\0") if name)
    wanted = [p for p in paths if p.is_file() and (p.suffix in (".py", ".md", ".toml") or p.name == "Makefile")]
    if not wanted:
        pytest.skip("no tracked files")
    return {str(p.relative_to(ROOT)): p.read_text(encoding="utf-8") for p in wanted}


MACHINE = re.compile(r"(?<![\w.])/(?:work|tmp|home|root|Users)/")


def test_no_path_of_a_machine(tracked):
    assert MACHINE.search("see /" + "work/x")
    assert not MACHINE.search("https://example.org/home/x and docs/work/x")
    found = [
        f"{path}:{i}"
        for path, text in tracked.items()
        for i, line in enumerate(text.splitlines(), 1)
        if MACHINE.search(line)
    ]
    assert not found


NOTE = r"NOTE \[([^\]\n]+)\]"
DEFINITION = re.compile(rf'^[ \t]*(?:#+ *|r?""")?{NOTE}[ \t]*$', re.MULTILINE)


def test_each_note_is_defined_once(tracked):
    defined = Counter(name for text in tracked.values() for name in DEFINITION.findall(text))
    mentioned = {name for text in tracked.values() for name in re.findall(NOTE, text)}
    assert len(mentioned) >= 5
    assert mentioned == defined.keys()
    assert set(defined.values()) == {1}, defined


SUFFIXES = (".py", ".md", ".toml", ".txt", ".yml", ".yaml", ".json", ".svg")


def repository_paths(text):
    """Words in backticks, and targets of links, that say where in the repository something is."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    words = re.findall(r"`([\w./-]+)`", text) + re.findall(r"\]\((?!\w+:|#)([^)#\s]+)", text)
    for word in words:
        inside = (ROOT / word.split("/")[0]).is_dir() and "/" in word
        if inside or word.endswith((*SUFFIXES, "/")):
            yield word


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_paths_in_prose_exist(name):
    if not (ROOT / name).is_file():
        pytest.skip(f"no {name} yet")
    folders = (ROOT, ROOT / "compiled_loss")  # prose about the package leaves its name out
    mentioned = repository_paths((ROOT / name).read_text(encoding="utf-8"))
    assert not [path for path in mentioned if not any((folder / path).exists() for folder in folders)]


def test_prose_reader():
    text = "`tests/nowhere` `a.py` `[N, V]` `tokens/s` `torch.compile` [x](docs/y.md#z) [u](https://u/v.md)\n```\n`b.py`\n```\n"
    assert list(repository_paths(text)) == ["tests/nowhere", "a.py", "docs/y.md"]
