from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fpo.stages.train.callbacks import Snapshots, snapshot_folder
from tiny import tiny_llama
from tiny_tokenizers import chatml
from transformers import AutoModelForCausalLM, AutoTokenizer


def step(
    out: Path, number: int, model: Any, *, every: int = 2, last: int = 10, first: bool = True, how: str = "on_step_end"
) -> None:
    state = SimpleNamespace(global_step=number, max_steps=last, is_world_process_zero=first)
    args = SimpleNamespace(output_dir=str(out))
    getattr(Snapshots(every), how)(args, state, None, model=model, processing_class=chatml(), optimizer=None)


def found(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "snapshots").iterdir()) if (out / "snapshots").exists() else []


def test_every_so_many_steps_the_model_is_saved_but_not_at_the_end(tmp_path):
    for number in range(1, 11):
        step(tmp_path, number, tiny_llama())
    assert found(tmp_path) == ["step-000002", "step-000004", "step-000006", "step-000008"]


def test_a_snapshot_is_a_model_s_folder_and_nothing_more(tmp_path):
    model = tiny_llama(3)
    step(tmp_path, 2, model)
    folder = snapshot_folder(tmp_path, 2)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    for name, weight in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), weight)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == chatml().chat_template
    assert {path.suffix for path in folder.iterdir()} <= {".json", ".jinja", ".safetensors"}


def test_a_snapshot_of_a_run_that_was_stopped_is_replaced(tmp_path):
    step(tmp_path, 2, tiny_llama(0))
    (snapshot_folder(tmp_path, 2) / "leftover").touch()
    step(tmp_path, 2, tiny_llama(1))
    loaded = AutoModelForCausalLM.from_pretrained(snapshot_folder(tmp_path, 2))
    assert torch.equal(loaded.model.norm.weight, tiny_llama(1).model.norm.weight)
    assert found(tmp_path) == ["step-000002"]
    assert not (snapshot_folder(tmp_path, 2) / "leftover").exists()


def test_saving_that_is_interrupted_leaves_no_half_snapshot(tmp_path, monkeypatch):
    step(tmp_path, 2, tiny_llama(0))
    before = {path.name: path.read_bytes() for path in snapshot_folder(tmp_path, 2).iterdir()}

    def stop(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(chatml()), "save_pretrained", stop)  # the weights are written, the tokenizer is not
        for number in (2, 4):
            with pytest.raises(KeyboardInterrupt):
                step(tmp_path, number, tiny_llama(1))
    assert not snapshot_folder(tmp_path, 4).exists()
    assert {path.name: path.read_bytes() for path in snapshot_folder(tmp_path, 2).iterdir()} == before
    step(tmp_path, 4, tiny_llama(1))
    step(tmp_path, 2, tiny_llama(1))
    assert found(tmp_path) == ["step-000002", "step-000004"]


def test_a_run_that_goes_on_saves_what_was_its_last_step(tmp_path):
    step(tmp_path, 10, tiny_llama(), last=10)
    assert found(tmp_path) == []
    step(tmp_path, 10, tiny_llama(), last=20, how="on_train_begin")
    assert found(tmp_path) == ["step-000010"]


def test_a_run_that_begins_saves_nothing_yet_and_other_processes_never(tmp_path):
    step(tmp_path, 0, tiny_llama(), how="on_train_begin")
    step(tmp_path, 2, tiny_llama(), first=False)
    assert found(tmp_path) == []
