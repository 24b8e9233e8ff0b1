import datasets
import pytest
from seams.lab import Lab


@pytest.fixture(scope="session")
def lab(world, tmp_path_factory) -> Lab:
    """Small runs that all tests of this folder share; tokenised conversations go into a folder of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("hf"))
        yield Lab(world, tmp_path_factory.mktemp("lab"))
