"""A row per module in docs/architecture.md: ``python -m parity_tests.modules_table`` writes it."""

from __future__ import annotations

import ast
from pathlib import Path

from parity_tests.test_floors import FLOORS, ROOT

PAGE = Path(__file__).parents[1] / "docs" / "architecture.md"
BEGIN, END = "<!-- modules: written by parity_tests.modules_table -->", "<!-- end of modules -->"


def summary(path: Path) -> str:
    """Return the first line of a module's docstring, as Markdown."""
    said = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
    return said.partition("\n")[0].replace("``", "`").replace("|", "\\|")


def table() -> str:
    """Return the wings from the ground up, a row for every module of each."""
    lines = [BEGIN]
    for floor, wings in enumerate(FLOORS, 1):
        for wing in sorted(wings):
            folder = ROOT / wing
            lines += ["", f"### {floor}: `{wing}/`", "", summary(folder / "__init__.py"), ""]
            lines += ["| module | what it holds |", "|---|---|"]
            for path in sorted(folder.rglob("*.py")):
                name = path.relative_to(folder).with_suffix("").as_posix()
                if name.rpartition("/")[2] != "__init__":
                    lines.append(f"| `{name}` | {summary(path)} |")
    return "\n".join([*lines, "", END])


def main() -> None:
    """Write the rows into the page."""
    head, _, rest = PAGE.read_text("utf-8").partition(BEGIN)
    PAGE.write_text(head + table() + rest.partition(END)[2], "utf-8")


if __name__ == "__main__":
    main()
