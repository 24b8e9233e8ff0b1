import socket
import time
from collections.abc import Iterator
from pathlib import Path

import datasets
import huggingface_hub
import pytest
from fake_hub import serve
from fpo.cache.errors import UserError
from fpo.stages.data.chat import Example
from fpo.stages.data.preferences import load_preferences
from fpo.stages.data.raw_rows import PROBE_SECONDS, may_be_hub_id
from huggingface_hub import constants

SOON = PROBE_SECONDS + 1  # seconds


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    for name in ("HF_HUB_CACHE", "HF_HOME"):
        monkeypatch.setattr(constants, name, str(tmp_path_factory.mktemp("hub")))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("hf"))


def use(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes this address the hub's."""
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", address)


@pytest.fixture
def silent() -> Iterator[str]:
    """An address that takes calls and answers none."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def refused(source: str) -> str:
    start = time.monotonic()
    with pytest.raises(UserError, match=r"\A[^\n]+\Z") as caught:
        load_preferences(source, split="train")
    assert time.monotonic() - start < SOON
    return str(caught.value)


@pytest.mark.parametrize("name", ["pairs", "owner/pairs"])
def test_without_a_hub_the_answer_comes_soon(monkeypatch, silent, name):
    use("http://127.0.0.1:9", monkeypatch)  # nobody listens
    line = refused(name)
    assert f"no local file or folder {name!r}" in line and "does not answer" in line
    use(silent, monkeypatch)
    assert f"no local file or folder {name!r}" in refused(name)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refused(name)


def test_what_was_fetched_before_is_looked_for_in_the_cache_alone_without_a_hub(monkeypatch, tmp_path):
    rows = datasets.Dataset.from_list([{"prompt": "Hello", "chosen": "Hi", "rejected": "Ha"}])
    asked = []

    def load_dataset(name: str, config: str | None, *, split: str) -> datasets.Dataset:
        asked.append((name, config, split, huggingface_hub.is_offline_mode(), datasets.config.HF_HUB_OFFLINE))
        return rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    use("http://127.0.0.1:9", monkeypatch)
    assert load_preferences("owner/pairs", split="train").example(0) == Example("Hello", "Hi", "Ha")
    with serve(tmp_path, "owner/pairs") as address:
        use(address, monkeypatch)
        load_preferences("owner/pairs", split="test", config="default")
    assert asked == [("owner/pairs", None, "train", True, True), ("owner/pairs", "default", "test", False, False)]
    assert not huggingface_hub.is_offline_mode()


@pytest.mark.parametrize(
    "name", ["../pairs", "~/pairs", "a/b/c", "a b", "pairs.jsonl", "data/pairs.csv.gz", "ä/b", "x" * 97]
)
def test_a_name_that_no_data_set_of_the_hub_has_is_a_missing_file(monkeypatch, name):
    use("http://127.0.0.1:9", monkeypatch)
    assert refused(name) == f"expected preference data at {name}, found no such file or folder"


@pytest.mark.parametrize("name", ["squad", "HuggingFaceH4/ultrafeedback_binarized", "a-b/c.d_e"])
def test_the_hub_s_own_names_may_be_there(name):
    assert may_be_hub_id(name) and not Path(name).exists()
