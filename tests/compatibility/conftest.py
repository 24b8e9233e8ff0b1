"""The committed table of what works: each module of this folder owns one section of `results/compatibility.md`."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

TABLE = Path(__file__).resolve().parent.parent.parent / "results" / "compatibility.md"


@pytest.fixture(scope="session")
def committed_section(pytestconfig: pytest.Config) -> Callable[[str, str], None]:
    """`committed_section(heading, text)` asserts that the section says `text`; `--write-results` makes it say so."""

    def check(heading: str, text: str) -> None:
        content = TABLE.read_text()
        section = re.compile(rf"(?<=^## {re.escape(heading)}\n).*?(?=^## |\Z)", re.DOTALL | re.MULTILINE)
        (found,) = section.findall(content)
        wanted = f"\n{text.strip()}\n\n"
        if pytestconfig.getoption("--write-results"):
            TABLE.write_text(section.sub(lambda _: wanted, content).rstrip() + "\n")
        else:
            assert found.strip() == wanted.strip()

    return check
