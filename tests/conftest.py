import gc
from typing import Any

import pytest


@pytest.fixture(scope="session", autouse=True)
def user_folder_of_the_tests(tmp_path_factory):
    """What the program remembers between runs (hashes, decoded caches) stays out of the developer's home."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FPO_HOME", str(tmp_path_factory.mktemp("fpo_home")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Any:
    """The `World` of tiny_world.py, which is imported here alone: it takes torch, and some tests do without."""
    from tiny_world import make_world

    world = make_world(tmp_path_factory.mktemp("world"))
    gc.freeze()  # the Trainer collects garbage whenever it starts; what is imported by now is none
    return world
