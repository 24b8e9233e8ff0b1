"""Whole runs of stage two through the command line: what they write, and that they can be stopped and repeated."""

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from fpo.cache.reader import open_cache
from fpo.pipeline.commands import align as run_align
from fpo.pipeline.commands import inputs
from fpo.stages.model.models import load_model
from fpo.stages.train.align import FPOTrainer
from fpo.stages.train.methods import METHODS
from peft import PeftModel
from tiny_world import SITES, files, fpo, losses, metrics, ran, state_of
from transformers import AutoModelForCausalLM, AutoTokenizer

LOG_2 = pytest.approx(math.log(2), rel=1e-6)
# What differs between two runs of the same command, or is a mean since the last start.
CLOCK = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "train_tokens_per_second")
CLOCK += ("train_peak_memory_bytes", "train_peak_process_bytes", "train_loss")
CLOCK += ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")


@pytest.fixture(scope="module")
def runs_of_all(world, tmp_path_factory) -> dict[str, Path]:
    """Two epochs of every method; FPO is evaluated too."""
    folder = tmp_path_factory.mktemp("runs")
    for method in METHODS:
        options = {"eval_cache": world.eval_cache, "eval_steps": 2} if method == "fpo" else {}
        ran(world.align(folder / method, method=method, epochs=2, **options))
    return {method: folder / method for method in METHODS}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns(runs_of_all, method):
    found = losses(runs_of_all[method])
    assert len(found) == 4
    assert sum(found[2:]) < sum(found[:2])


@pytest.mark.parametrize("method", ["fpo", "dpo", "tdpo1", "tdpo2"])
def test_the_first_loss_is_log_2_where_the_margin_is_the_reference_s(runs_of_all, method):
    assert losses(runs_of_all[method])[0] == LOG_2


@pytest.mark.parametrize("method", METHODS)
def test_metrics_have_the_names_that_people_are_used_to(runs_of_all, method):
    line = next(line for line in metrics(runs_of_all[method]) if "loss" in line)
    names = {"loss", "grad_norm", "learning_rate", "epoch", "step", "logps/chosen", "logps/rejected"}
    names |= {f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")}
    divergence = METHODS[method].divergence
    if divergence:
        names |= {"constraint/delta", "constraint/grad_ratio"}
        prefix = "features/mse" if divergence == "features" else "kl"
        names |= {f"{prefix}_chosen", f"{prefix}_rejected"}
    if divergence == "features":
        names |= {"features/miss_rate", "features/error_bound"}
    assert set(line) == names
    assert line["rewards/margins"] == pytest.approx(line["rewards/chosen"] - line["rewards/rejected"])


def test_parity_is_logged_for_what_was_compared(runs_of_all):
    assert {name for name in metrics(runs_of_all["dpo"])[0] if "parity" in name} == {
        "parity/logps",
        "parity/logps_allowed",
    }
    first = metrics(runs_of_all["fpo"])[0]
    assert first["parity/mse"] <= first["parity/mse_allowed"]


def test_evaluations_are_logged_under_their_own_names(runs_of_all):
    lines = [line for line in metrics(runs_of_all["fpo"]) if "eval_loss" in line]
    assert [line["step"] for line in lines] == [0, 2, 4]  # at 0: what the summary compares with
    for line in lines:
        assert {"eval_rewards/accuracies", "eval_features/mse_chosen", "eval_logps/chosen"} <= set(line)
        assert not [name for name in line if name.startswith(("rewards", "logps", "features"))]


@pytest.mark.parametrize("method", METHODS)
def test_the_result_is_a_folder_that_transformers_loads(world, runs_of_all, method):
    run = runs_of_all[method]
    model = AutoModelForCausalLM.from_pretrained(run)
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert any(not torch.equal(w, world.policy().get_parameter(name)) for name, w in model.named_parameters())
    tokenizer = AutoTokenizer.from_pretrained(run)
    assert tokenizer.chat_template == open_cache(world.cache, sites=[]).manifest.meaning.chat_template
    result = [name for name in files(run) if not name.startswith("checkpoint-")]
    assert not [name for name in result if name.endswith((".bin", ".pt", ".pth", ".pkl"))]
    assert not list(run.rglob("training_args.bin"))


def test_the_record_holds_configuration_fingerprint_and_versions(world, runs_of_all):
    record = yaml.safe_load((runs_of_all["fpo"] / "run.yaml").read_text())
    assert (record["method"], record["lr"], record["site"]) == ("fpo", 1e-3, [SITES[0].name])
    assert record["cache_fingerprint"] == open_cache(world.cache).manifest.meaning.fingerprint()
    assert set(record["versions"]) >= {"fpo", "torch", "transformers", "sae-lens"}
    assert all(record["versions"].values())


def test_a_record_given_as_a_configuration_makes_the_same_run(runs_of_all, tmp_path):
    run = runs_of_all["fpo"]
    ran(fpo("align", "--config", run / "run.yaml", "--out", tmp_path / "again"))
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (run / "model.safetensors").read_bytes()
    records = [yaml.safe_load((folder / "run.yaml").read_text()) for folder in (run, tmp_path / "again")]
    assert records[0] | {"out": None} == records[1] | {"out": None}


def test_a_run_of_an_earlier_version_goes_on(world, tmp_path):
    """Its record held the settings of every command, and not the name of its own."""
    options = {"method": "dpo", "lr_scheduler": "constant", "warmup_steps": None, "save_steps": 1}
    ran(world.align(tmp_path / "run", max_steps=1, **options))
    record = yaml.safe_load((tmp_path / "run" / "run.yaml").read_text())
    del record["command"]
    earlier = {"width": 4096, "seeds": [0], "questions": None, "keep_features": 512, "resume": True, "base": None}
    (tmp_path / "run" / "run.yaml").write_text(yaml.safe_dump(earlier | record))
    ran(world.align(tmp_path / "run", "--resume", max_steps=2, **options))
    assert len(losses(tmp_path / "run")) == 2


def test_the_same_command_gives_the_same_weights_and_another_seed_others(world, runs_of_all, tmp_path):
    ran(world.align(tmp_path / "again", method="dpo", epochs=2))
    ran(world.align(tmp_path / "other", method="dpo", epochs=2, seed=1))
    weights = [(folder / "model.safetensors").read_bytes() for folder in (runs_of_all["dpo"], *tmp_path.iterdir())]
    assert len(set(weights)) == 2


def test_simpo_loads_the_policy_and_nothing_else(world, tmp_path, monkeypatch):
    loaded = []
    monkeypatch.setattr(inputs, "load_sae", lambda *_, **__: pytest.fail("loads an SAE"))
    monkeypatch.setattr(
        inputs, "load_model", lambda source, **kwargs: loaded.append(source) or load_model(source, **kwargs)
    )
    ran(world.align(tmp_path / "run", method="simpo", max_steps=1))
    assert [source.folder for source in loaded] == [world.gemma]


def test_fpo_loads_no_reference(world, tmp_path, monkeypatch):
    loaded = []
    monkeypatch.setattr(
        inputs, "load_model", lambda source, **kwargs: loaded.append(source) or load_model(source, **kwargs)
    )
    ran(world.align(tmp_path / "run", max_steps=1))
    assert len(loaded) == 1


def test_rmsprop_takes_other_steps_than_adam(world, runs_of_all, tmp_path):
    ran(world.align(tmp_path / "run", "--optimizer", "rmsprop", epochs=2, lr=1e-4))
    found = losses(tmp_path / "run")
    assert found[0] == LOG_2
    assert found[-1] != losses(runs_of_all["fpo"])[-1]


def test_a_loss_that_is_not_finite_stops_the_run(world, tmp_path):
    result = world.align(tmp_path / "run", method="dpo", lr=1e30, epochs=2)
    assert (result.exit_code, "nan" in result.stderr, "pair" in result.stderr) == (1, True, True), result.stderr
    assert not (tmp_path / "run" / "model.safetensors").exists()


# Resuming.


def stop_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Interrupts training in the middle of the step after `steps` steps."""
    real = FPOTrainer.row_losses

    def row_losses(self: FPOTrainer, *args: Any) -> Any:
        if self.state.global_step == steps:
            raise KeyboardInterrupt
        return real(self, *args)

    monkeypatch.setattr(FPOTrainer, "row_losses", row_losses)


class Planted:
    """A pickle that leaves a trace where it is loaded."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.trace),)


@pytest.fixture(scope="module")
def straight(world, tmp_path_factory) -> Callable[..., Path]:
    """A run in one go; the same options give the same run."""
    done: dict[Any, Path] = {}

    def run(*extra: str, **options: Any) -> Path:
        key = str((extra, options))
        if key not in done:
            done[key] = tmp_path_factory.mktemp("straight") / "run"
            ran(world.align(done[key], *extra, **options))
        return done[key]

    return run


@pytest.mark.parametrize(("method", "extra"), [("fpo", ()), ("dpo", ("--lora-r", "2"))])
@pytest.mark.parametrize("steps", [1, 3])
def test_a_run_stopped_and_resumed_ends_where_one_in_one_go_ends(
    world, straight, tmp_path, monkeypatch, method, extra, steps
):
    options: dict[str, Any] = {"method": method, "epochs": 2, "batch_size": 5, "save_steps": 2}
    whole, broken = straight(*extra, **options), tmp_path / "broken"
    with monkeypatch.context() as patch:
        stop_after(patch, steps)
        result = world.align(broken, *extra, **options)
    assert result.exit_code == 130
    assert "--resume goes on" in result.stderr
    for checkpoint in broken.glob("checkpoint-*"):
        torch.save(Planted(tmp_path / "trace"), checkpoint / "training_args.bin")
    ran(world.align(broken, "--resume", *extra, **options))
    assert not (tmp_path / "trace").exists()
    name = "adapter_model.safetensors" if extra else "model.safetensors"
    assert (broken / name).read_bytes() == (whole / name).read_bytes()
    expected, found = (
        [{key: value for key, value in line.items() if key not in CLOCK} for line in metrics(run)]
        for run in (whole, broken)
    )
    assert found == expected


FINISHED = {
    "in the middle of an epoch": {"max_steps": 3},
    "a whole epoch": {"epochs": 1, "lr_scheduler": "cosine"},
    "half an epoch": {"epochs": 1.5},
    "accumulated": {"max_steps": 3, "accumulation": 2},
    "evaluated": {"max_steps": 3, "eval_cache": True},
    "snapshots": {"max_steps": 3, "snapshot_steps": 1},
    "an adapter": {"max_steps": 3, "lora_r": 2},
    "a merged adapter": {"max_steps": 3, "lora_r": 2, "merge": True},
}


@pytest.mark.parametrize("case", FINISHED)
def test_a_finished_run_that_is_resumed_says_so_and_touches_nothing(world, tmp_path, monkeypatch, case):
    run, options = tmp_path / "run", {"method": "dpo", **FINISHED[case]}
    if options.get("eval_cache"):
        options["eval_cache"] = world.eval_cache
    ran(world.align(run, **options))
    before, steps = state_of(run), len(losses(run))
    monkeypatch.setattr(run_align, "load_model", lambda *_, **__: pytest.fail("loads a model"))
    for _ in range(2):
        said = ran(world.align(run, "--resume", **options)).stdout.replace("\n", " ")
        assert f"{run}: finished after {steps} steps; nothing was left to do" in said
        assert state_of(run) == before


@pytest.mark.parametrize(
    ("case", "left"),
    [("in the middle of an epoch", "no mark"), ("half an epoch", "nothing"), ("a merged adapter", "nothing")],
)
def test_a_run_killed_in_its_last_save_saves_and_trains_no_more(world, tmp_path, monkeypatch, case, left):
    run, options = tmp_path / "run", {"method": "dpo", **FINISHED[case]}
    with monkeypatch.context() as patch:
        if left == "nothing":
            real = FPOTrainer.save_model

            def save_model(self: FPOTrainer, output_dir: str | None = None, _internal_call: bool = False) -> None:
                if not _internal_call:
                    raise KeyboardInterrupt
                real(self, output_dir, _internal_call)

            patch.setattr(FPOTrainer, "save_model", save_model)
        else:
            patch.setattr(inputs, "sync_files", lambda folder: (_ for _ in ()).throw(KeyboardInterrupt))
        assert world.align(run, **options).exit_code == 130
    steps = losses(run)
    ran(world.align(run, "--resume", **options))
    ran(world.align(tmp_path / "whole", **options))
    assert (run / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert losses(run) == steps == losses(tmp_path / "whole")
    assert "finished after" in ran(world.align(run, "--resume", **options)).stdout.replace("\n", " ")


def test_a_finished_run_goes_on_if_it_is_to_be_longer_and_ends_as_one_in_one_go(world, tmp_path):
    run = tmp_path / "run"
    ran(world.align(run, method="dpo", max_steps=3))
    result = world.align(run, "--resume", method="dpo", max_steps=5)
    assert "finished after" not in ran(result).stdout
    ran(world.align(tmp_path / "whole", method="dpo", max_steps=5))
    assert (run / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
    before = state_of(run)
    for shorter in ({"max_steps": 4}, {"epochs": 2}, {"max_steps": 5}):
        assert "finished after 5 steps" in ran(world.align(run, "--resume", method="dpo", **shorter)).stdout
        assert state_of(run) == before
    for checkpoint in run.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    result = world.align(run, "--resume", method="dpo", max_steps=6)
    assert (result.exit_code, "expected a checkpoint to go on from" in result.stderr) == (2, True), result.stderr


def test_a_checkpoint_beyond_the_end_of_a_shorter_run_is_not_taken_for_its_end(world, tmp_path, monkeypatch):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        world.align(run, method="dpo", max_steps=6, save_steps=2)
    before = files(run)
    result = world.align(run, "--resume", method="dpo", max_steps=3, save_steps=2)
    assert result.exit_code == 2
    assert "--resume: expected a run of 4 steps or more, which its checkpoint has behind it, found 3" in result.stderr
    assert files(run) == before


def test_a_finished_run_is_not_uploaded_in_silence(world, tmp_path):
    run = tmp_path / "run"
    ran(world.align(run, method="dpo", max_steps=1))
    result = world.align(run, "--resume", "--push-to-hub", method="dpo", max_steps=1)
    assert (result.exit_code, "is finished; upload it with `hf upload" in result.stderr) == (2, True), result.stderr


def test_resuming_with_other_settings_is_refused(world, tmp_path):
    run = tmp_path / "run"
    ran(world.align(run, method="dpo", max_steps=1))
    before = files(run)
    result = world.align(run, "--resume", method="dpo", max_steps=1, lr=1e-4)
    assert (result.exit_code, "lr: was 0.001, is 0.0001" in result.stderr) == (2, True), result.stderr
    assert files(run) == before


# LoRA.


@pytest.fixture(scope="module")
def lora(world, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("lora") / "run"
    ran(world.align(run, "--lora-r", 4, epochs=2, lr=1e-2))
    return run


def test_an_adapter_starts_at_the_reference_and_learns(lora):
    found = losses(lora)
    assert found[0] == LOG_2
    assert sum(found[2:]) < sum(found[:2])
    assert (lora / "adapter_model.safetensors").exists()
    assert not (lora / "model.safetensors").exists()


def test_an_adapter_s_run_can_be_repeated(world, lora, tmp_path):
    torch.manual_seed(77)
    ran(world.align(tmp_path / "again", "--lora-r", 4, epochs=2, lr=1e-2))
    name = "adapter_model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (lora / name).read_bytes()


def test_a_merged_adapter_is_the_base_model_with_the_adapter(world, lora, tmp_path):
    merged = tmp_path / "merged"
    ran(world.align(merged, "--lora-r", 4, "--merge", epochs=2, lr=1e-2))
    assert not (merged / "adapter_model.safetensors").exists()
    whole = AutoModelForCausalLM.from_pretrained(merged)
    adapted = PeftModel.from_pretrained(world.policy(), str(lora))
    tokens = torch.arange(1, 30)[None]
    with torch.no_grad():
        found, expected, base = (model(tokens).logits for model in (whole, adapted, world.policy()))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert float((found - base).abs().max()) > 1e-3


def test_an_adapter_names_its_base_model(world, lora):
    assert json.loads((lora / "adapter_config.json").read_text())["base_model_name_or_path"] == str(world.gemma)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_under_bf16_policy_and_reference_agree_to_the_bit_when_packed_alike(world, tmp_path, checkpointing):
    one_pair_a_row = {"dtype": "bf16", "token_budget": 1}
    ran(world.precompute(tmp_path / "cache", **one_pair_a_row))
    options = {"cache": tmp_path / "cache", "max_steps": 1, "activation_checkpointing": checkpointing or None}
    ran(world.align(tmp_path / "run", **one_pair_a_row, **options))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["parity/logps"] == lines[0]["parity/mse"] == 0
    assert lines[1]["loss"] == pytest.approx(math.log(2), abs=1e-7)  # the Trainer adds losses up in fp32
    assert lines[1]["rewards/margins"] == lines[1]["constraint/delta"] == 0
