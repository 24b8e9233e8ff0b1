import pytest
from tiny_setting import tiny_setting

from benchmarks.prepare import prepare


@pytest.fixture(scope="session")
def prepared(world, tmp_path_factory):
    """A tiny setting and its prepared folder."""
    folder = tmp_path_factory.mktemp("prepared")
    setting = tiny_setting(world)
    prepare(setting, folder)
    return setting, folder
