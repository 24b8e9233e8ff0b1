"""Every option of every command changes what it says it changes.

A new option needs an entry: a small function with `@effect` in one of the `of_*.py` beside this file.
"""

import pytest
from seams import (  # noqa: F401 (they register their checks)
    of_adapters,
    of_caches,
    of_comparison,
    of_data,
    of_evaluation,
    of_judge,
    of_objective,
    of_running,
    of_sae,
    of_training,
)
from seams.options import CHECKS, declared

KEYS = [pytest.param(*key, id=" ".join(key)) for key in declared() if key in CHECKS]


def test_every_option_of_every_command_has_a_check():
    lacking = [f"{command} {option}" for command, option in declared() if (command, option) not in CHECKS]
    assert not lacking, "write a check with @effect for: " + ", ".join(lacking)


@pytest.mark.parametrize(("command", "option"), KEYS)
def test_the_option_does_what_it_says(lab, command, option):
    CHECKS[command, option](lab, command)
