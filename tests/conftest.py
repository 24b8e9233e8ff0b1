import pytest
from tiny_world import world

__all__ = ["world"]  # a fixture
import torch

# Tiny tensors gain nothing from a second thread and lose much where cores are shared.
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def user_folder_of_the_tests(tmp_path_factory):
    """What the program remembers between runs (hashes, decoded caches) stays out of the developer's home."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FPO_HOME", str(tmp_path_factory.mktemp("fpo_home")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield
