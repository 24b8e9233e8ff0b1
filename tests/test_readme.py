"""The README shows what commands wrote."""

import re
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("profile", "caption"),
    [("embedded", "Methods"), ("embedded", "The paper's claims"), ("smollm2-135m-cpu", "Methods")],
)
def test_the_table_is_the_one_that_the_command_wrote(profile, caption):
    written = (PROJECT / "results" / profile / "table.md").read_text()
    found = re.search(rf"\*\*{caption}\*\*\n\n((?:\|.*\n)+)", written)
    assert found is not None and len(found[1].splitlines()) > 5
    assert found[1] in (PROJECT / "README.md").read_text()
