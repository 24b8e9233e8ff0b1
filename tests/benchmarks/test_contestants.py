import statistics

import pytest

from benchmarks.contestants import CONTESTANTS, train, trl_trainer
from benchmarks.prepare import cached_pairs
from benchmarks.training_step import rows


@pytest.mark.parametrize("name", ["fpo", "tdpo2-ckpt"])
def test_our_contestants_train_the_measured_steps(prepared, name):
    setting, folder = prepared
    result = train(setting, folder, name)
    assert len(result["steps"]) == setting.steps
    assert sum(result["steps"]) == pytest.approx(result["seconds"], rel=0.1)
    assert result["seconds_a_pair"] == statistics.median(result["steps"]) / setting.batch
    assert 0 < result["extra_bytes"] < result["tensor_bytes"] < result["resident_bytes"]


# TRL gives the old name of the setting and warns of its own experimental folder; datasets of temporary folders.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["trl-simpo", "trl-dpo-ckpt", "trl-dpo-precomputed"])
def test_trl_trains_on_the_same_token_ids(prepared, name):
    setting, folder = prepared
    trainer = trl_trainer(setting, folder, CONTESTANTS[name])
    batch = next(iter(trainer.get_train_dataloader()))
    ids = batch["chosen_input_ids" if "simpo" in name else "input_ids"]
    for row, pair in zip(ids, cached_pairs(folder)[:2], strict=False):
        expected = [*pair.prompt_ids, *pair.chosen_ids]
        assert row.tolist()[: len(expected)] == expected
    assert trainer.args.activation_checkpointing == CONTESTANTS[name].checkpointing
    result = train(setting, folder, name)
    assert 0 < result["extra_bytes"] < result["tensor_bytes"]


def test_the_table_relates_every_contestant_to_the_first_and_says_what_did_not_fit():
    one = {"seconds_a_pair": 2.0, "tensor_bytes": 10, "resident_bytes": 100, "cores_busy": 2.0}
    other = {"seconds_a_pair": 6.0, "tensor_bytes": 5, "resident_bytes": 400, "cores_busy": 1.5}
    results = {"fpo": one, "trl-dpo": other, "trl-simpo": {"failed": "out of memory"}}
    made = rows(results, {name: name for name in results})
    assert [made[1][key] for key in ("time, ratio", "ratio", "resident, ratio")] == [3, 0.5, 4]
    assert made[2]["seconds a pair"] == "out of memory"
