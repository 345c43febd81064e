"""Build the sdist and from it the wheel, and use the wheel in an empty environment: python tools/check_wheel.py dist.

The demo, an inspection, and every block of Python in the README and the guides run there, without the repository.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEMO = "demo --device cpu --steps 2 --vocab 1024 --tokens 256 --width 64 --layers 1"
INSPECT = "inspect linear_cross_entropy --tokens 64 --hidden 32 --vocab 256 --device cpu --no-measure"
PAGES = """
import sys
import compiled_loss, pages
assert compiled_loss.__file__.startswith(sys.prefix), compiled_loss.__file__
for page in pages.WITH_PYTHON:
    print(page, flush=True)
    pages.run(pages.read(page), page)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where sdist and wheel go")
    parser.add_argument("--torch", default="2.13.0", help="default: %(default)s")
    given = parser.parse_args()
    output = given.folder.resolve()
    run(sys.executable, "-m", "build", "--outdir", output, ROOT)
    wheel = max(output.glob("*.whl"), key=lambda path: path.stat().st_mtime)
    contents(wheel)
    with tempfile.TemporaryDirectory() as folder:
        use(wheel, Path(folder), given.torch)
    print(f"{wheel.name} works", flush=True)


def contents(wheel: Path) -> None:
    """Exit unless the wheel has all files of the package, and no others but its metadata."""
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    files = subprocess.run(["git", "ls-files", "compiled_loss"], cwd=ROOT, capture_output=True, text=True, check=True)
    if names != (expected := set(files.stdout.split())):
        sys.exit(f"{wheel.name}: other files than the package's: {', '.join(sorted(names ^ expected))}")


def use(wheel: Path, folder: Path, torch: str) -> None:
    """Exit unless the wheel does what the README says, installed alone."""
    run(sys.executable, "-m", "venv", folder / "venv")
    python, command = folder / "venv/bin/python", folder / "venv/bin/compiled-loss"
    packages = (f"torch=={torch}", f"compiled-loss[demo,inspect] @ {wheel.as_uri()}")
    run(python, "-m", "pip", "install", "--quiet", "--no-compile", "-c", ROOT / "constraints.txt", *packages)
    run(command, *DEMO.split(), "--output", folder / "demo.png", cwd=folder)
    run(command, *INSPECT.split(), cwd=folder)
    run(python, "-c", PAGES, cwd=folder, path=ROOT / "tests/support")


def run(*command: str | Path, cwd: Path = ROOT, path: Path | str = "") -> None:
    environment = {**os.environ, "PYTHONPATH": str(path)}
    print("$", " ".join(map(str, command))[:120], flush=True)
    if code := subprocess.run(command, cwd=cwd, env=environment, check=False).returncode:
        sys.exit(code)


if __name__ == "__main__":
    main()
