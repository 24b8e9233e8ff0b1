"""Lines of the product: `python tests/count_lines.py` prints files, lines and lines of code of each wing.

Lines of code are those that are no blank line, comment, docstring or import.
"""

import ast
import io
import tokenize
from collections import defaultdict
from pathlib import Path

PROJECT = Path(__file__).parents[1]
PACKAGES = ("cache", "stages", "pipeline")
NO_CODE = (
    *(tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE),
    *(tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER),
)


def modules() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (PROJECT / package).rglob("*.py"))


def lines_of_code(source: str) -> int:
    """Lines that hold code of Python source text."""
    no_code: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        # A constant that nothing reads is a docstring.
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if is_text or isinstance(node, ast.Import | ast.ImportFrom):
            no_code |= set(range(node.lineno, node.end_lineno + 1))
    code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in NO_CODE:
            code |= set(range(token.start[0], token.end[0] + 1))
    return len(code - no_code)


def count() -> dict[str, tuple[int, int, int]]:
    """Files, lines and lines of code by folder, and of `all`."""
    totals: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for path in modules():
        source = path.read_text()
        for name in (str(path.parent.relative_to(PROJECT)), "all"):
            for position, number in enumerate((1, len(source.splitlines()), lines_of_code(source))):
                totals[name][position] += number
    return {name: (found[0], found[1], found[2]) for name, found in totals.items()}


if __name__ == "__main__":
    print(f"{'folder':<24}{'files':>8}{'lines':>8}{'code':>8}")  # noqa: T201
    for name, (files, lines, code) in count().items():
        print(f"{name:<24}{files:>8}{lines:>8}{code:>8}")  # noqa: T201
