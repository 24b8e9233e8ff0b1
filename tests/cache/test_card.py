import dataclasses
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from cache_rows import MEANING, SITES, write_cache
from fpo.cache.card import data_card
from fpo.cache.manifest import Manifest
from fpo.cache.reader import open_cache
from huggingface_hub import DatasetCard


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FPO_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


def header(card: str) -> dict[str, Any]:
    return dict(yaml.safe_load(card.split("---\n")[1]))


def test_the_card_has_the_counts_and_the_sites(tmp_path: Path):
    manifest = write_cache(tmp_path, 10)
    card = (tmp_path / "README.md").read_text()
    assert f"`{manifest.meaning.fingerprint()}`" in card
    for line in ("| pairs | 9 |", "| skipped, empty | 1 |", f"`{SITES[1].sae}`"):
        assert line in card


def test_the_header_is_one_that_the_hub_s_own_reader_takes(tmp_path: Path):
    write_cache(tmp_path, 10)
    found = DatasetCard.load(tmp_path / "README.md").data
    assert found.size_categories == ["n<1K"]
    assert found.task_categories == ["text-generation"]
    assert {"preference-optimization", "sparse-autoencoder"} <= set(found.tags)


@pytest.mark.parametrize(
    ("pairs", "category"),
    [
        *((0, "n<1K"), (999, "n<1K"), (1000, "1K<n<10K"), (61_135, "10K<n<100K")),
        *((10**7, "10M<n<100M"), (10**12, "n>1T")),
    ],
)
def test_the_size_is_told_in_the_hub_s_categories(tmp_path: Path, pairs: int, category: str):
    shard = dataclasses.replace(write_cache(tmp_path, 1).shards[0], rows=pairs)
    assert header(data_card(Manifest(MEANING, Manifest.load(tmp_path).numerics, (shard,))))["size_categories"] == [
        category
    ]


@pytest.mark.parametrize("split", ["train_prefs", "test.v2"])
def test_the_folder_loads_as_a_data_set_of_the_same_values(tmp_path: Path, split: str):
    folder = tmp_path / "cache"
    write_cache(folder, 10, meaning=dataclasses.replace(MEANING, split=split))
    (folder / "provenance.jsonl").write_text('{"host": "a"}\n')
    (folder / "run.yaml").write_text("dtype: fp32\n")
    loaded = datasets.load_dataset(str(folder))
    assert list(loaded) == [split]
    cache = open_cache(folder)
    assert len(loaded[split]) == len(cache) == 9
    for row, expected in zip(loaded[split], cache, strict=True):
        assert row["pair_id"] == expected.pair.pair_id
        for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
            assert row[name] == getattr(expected.pair, name).tolist()
        for side in ("chosen", "rejected"):
            answer = getattr(expected, side)
            assert row[f"{side}_learnt"] == getattr(expected.pair, f"{side}_learnt").tolist()
            assert (row[f"{side}_ref_logp"], row[f"{side}_num_tokens"]) == (answer.logp, answer.num_tokens)
            for site, features in enumerate(answer.features):
                entry = {"ids": features.ids.tolist(), "values": features.values.tolist()}
                assert row[f"{side}_features_{site}"] == entry | {"floor": features.floor, "nnz": features.nnz}
    columns = {"pair_id", "prompt_ids", "chosen_ids", "rejected_ids"}
    for side in ("chosen", "rejected"):
        columns |= {f"{side}_{name}" for name in ("learnt", "ref_logp", "num_tokens", "features_0", "features_1")}
    assert set(loaded[split].column_names) == columns
