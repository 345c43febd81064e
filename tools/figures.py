"""Write the tables and pictures of figures from the committed raw results: python tools/figures.py [--check]."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
START, END = "<!-- figures: tools/figures.py -->\n", "<!-- end of figures -->"


def main() -> None:
    sys.path.insert(0, str(ROOT))  # of a checkout that is not installed
    import scaling

    from benches import plot
    from compiled_loss.pictures import dark

    check = "--check" in sys.argv[1:]
    for path, drawn in ((ROOT / "docs" / "benchmarks.md", plot), (ROOT / "docs" / "scaling.md", scaling)):
        text = path.read_text()
        before, rest = text.split(START)
        made = before + START + drawn.figures() + END + rest.split(END)[1]
        if not check:
            path.write_text(made)
        elif made != text:
            sys.exit(f"{path.name}: its figures are not those of the raw results: run python tools/figures.py")
        files = drawn.PICTURE, dark(drawn.PICTURE)
        if not all(file.exists() and drawn.digest() in file.read_bytes() for file in files):
            if check:
                sys.exit(f"{drawn.PICTURE.name} is not drawn from the raw results: run python tools/figures.py")
            drawn.draw()


if __name__ == "__main__":
    main()
