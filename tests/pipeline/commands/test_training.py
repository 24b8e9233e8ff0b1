"""What `fpo align` shares with `fpo sft`, where a cache is needed to see it."""

from pathlib import Path
from typing import Any

import pytest
from fpo.cache.errors import UserError
from fpo.pipeline.commands.align import run_align
from fpo.pipeline.commands.training import last_checkpoint, trainer_settings
from fpo.pipeline.config import AlignConfig
from fpo.pipeline.config_files import load_config


def align(world: Any, out: Path, **options: Any) -> Path:
    """Two epochs of DPO, two steps each."""
    given = {"model": str(world.gemma), "cache": world.cache, "out": out, "method": "dpo", "epochs": 2, "batch_size": 6}
    given |= {"lr": 1e-3, "warmup_steps": 0, "logging_steps": 1, "token_budget": 160, **options}
    run_align(load_config(AlignConfig, None, given))
    return out


def test_a_policy_s_snapshot_is_what_a_run_of_that_many_steps_ends_with(world, tmp_path):
    run = align(world, tmp_path / "run", snapshot_steps=1)
    snapshots = sorted((run / "snapshots").iterdir())
    assert [path.name for path in snapshots] == ["step-000001", "step-000002", "step-000003"]
    short = align(world, tmp_path / "short", max_steps=2)
    for name in ("model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"):
        assert (snapshots[1] / name).read_bytes() == (short / name).read_bytes()
    assert not (short / "snapshots").exists()


def test_an_adapter_has_no_snapshots(world, tmp_path):
    with pytest.raises(ValueError, match=r"\A--snapshot-steps: [^\n]*--lora-r[^\n]*\Z"):
        align(world, tmp_path / "run", snapshot_steps=1, lora_r=2)
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_that_was_cut_off_is_passed_over(tmp_path):
    config = load_config(AlignConfig, None, {"out": tmp_path, "resume": True})
    assert last_checkpoint(config) is None
    whole = dict.fromkeys(("9", "10", "best"), "{}\n")
    for step, state in (whole | {"11": '{"epoch": 1.', "12": "", "13": None}).items():
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "model.safetensors").touch()
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
    assert last_checkpoint(config) == str(tmp_path / "checkpoint-10")
    assert last_checkpoint(load_config(AlignConfig, None, {"out": tmp_path})) is None


@pytest.mark.parametrize(("given", "expected"), [(None, False), (True, True), (False, False)])
def test_layers_are_compiled_on_request_and_not_on_a_cpu_otherwise(tmp_path, given, expected):
    config = AlignConfig(out=tmp_path / "run", device="cpu", compile=given)
    assert trainer_settings(config)["compile_layers"] is expected


def test_which_layers_are_recomputed_is_no_question_where_none_is(tmp_path):
    given = {"out": tmp_path / "run", "device": "cpu", "checkpoint_every": 3}
    with pytest.raises(UserError, match=r"^--checkpoint-every: .*--activation-checkpointing"):
        load_config(AlignConfig, None, given, from_command_line=True)
    config = load_config(AlignConfig, None, given | {"activation_checkpointing": True})
    assert trainer_settings(config)["checkpoint_every"] == 3
