import threading
import time
from pathlib import Path

import huggingface_hub
import pytest
from fpo.pipeline.report import hub
from fpo.pipeline.report.hub import Repo, in_local_cache, missing_repos, refusal
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

MODEL, DATA = Repo("model", "owner/model"), Repo("dataset", "owner/pairsOfMine")


@pytest.fixture
def online(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: False)


def answer(monkeypatch, error: Exception | None) -> None:
    def auth_check(name, *, repo_type):
        if error is not None:
            raise error

    monkeypatch.setattr(huggingface_hub, "auth_check", auth_check)


def refused(kind: type[HfHubHTTPError]) -> HfHubHTTPError:
    error = kind.__new__(kind)
    Exception.__init__(error, "the server's words")
    return error


def test_offline_only_the_local_cache_counts(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: True)
    answer(monkeypatch, AssertionError("asked"))
    lines = missing_repos([MODEL, DATA, MODEL])
    assert [line.split(":")[0] for line in lines] == ["model owner/model", "dataset owner/pairsOfMine"]
    assert all("HF_HUB_OFFLINE" in line for line in lines)


def test_what_the_hub_gives_is_not_missing(monkeypatch, online):
    answer(monkeypatch, None)
    assert missing_repos([MODEL, DATA]) == []


@pytest.mark.parametrize(
    ("error", "part"),
    [
        (refused(GatedRepoError), "licence"),
        (refused(RepositoryNotFoundError), "private"),
        (refused(HfHubHTTPError), "server's words"),
        (ConnectionError("no route"), "no route"),
    ],
)
def test_a_refusal_says_what_to_do(monkeypatch, online, error, part):
    answer(monkeypatch, error)
    (line,) = missing_repos([DATA])
    assert line.startswith("dataset owner/pairsOfMine: ") and part in line and "\n" not in line
    reason = refusal("model", "owner/model")
    assert reason is not None and part in reason


def test_a_licence_is_accepted_at_the_page_of_the_repository(monkeypatch):
    answer(monkeypatch, refused(GatedRepoError))
    assert "https://huggingface.co/owner/model," in str(refusal("model", "owner/model"))
    assert "https://huggingface.co/datasets/owner/data," in str(refusal("dataset", "owner/data"))


def test_a_silent_hub_is_waited_for_once_and_not_for_long(monkeypatch, online):
    release = threading.Event()
    monkeypatch.setattr(hub, "HUB_SECONDS", 0.2)
    monkeypatch.setattr(huggingface_hub, "auth_check", lambda name, *, repo_type: release.wait(30))
    started = time.monotonic()
    lines = missing_repos([MODEL, DATA, Repo("model", "owner/third")])
    assert time.monotonic() - started < 2
    assert len(lines) == 3 and all("0.2 s" in line for line in lines)
    release.set()


def test_a_model_in_the_local_cache_is_whole(monkeypatch, online, tmp_path):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, *, local_files_only: str(tmp_path))
    answer(monkeypatch, AssertionError("asked"))
    (tmp_path / "config.json").touch()
    assert not in_local_cache(MODEL)
    (tmp_path / "model.safetensors").touch()
    assert in_local_cache(MODEL) and missing_repos([MODEL]) == []
    part = Repo("model", "owner/saes", "layer_3/width_16k")
    assert not in_local_cache(part)
    (tmp_path / part.part).mkdir(parents=True)
    assert in_local_cache(part)


def test_what_the_real_cache_does_not_have_is_not_in_it():
    assert not in_local_cache(Repo("model", "nobody/has-this")) and not in_local_cache(Repo("model", "not a name"))


def test_a_data_set_in_the_local_cache_is_where_datasets_puts_it(monkeypatch, tmp_path):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", Path(tmp_path))
    assert not in_local_cache(DATA)
    (tmp_path / "owner___pairs_of_mine" / "default" / "0.0.0" / "hash").mkdir(parents=True)
    assert in_local_cache(DATA)
    found = datasets.load.CachedDatasetModuleFactory(DATA.name, cache_dir=str(tmp_path)).get_module()
    assert found.builder_kwargs["repo_id"] == DATA.name
