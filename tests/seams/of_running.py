"""Checks of the options that say with what a command runs, what it says meanwhile, and where it leaves what."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from fpo.cache.reader import open_cache
from fpo.stages.model import attention as packed
from fpo.stages.model import flex
from seams.lab import Lab, plain_model
from seams.of_training import TRAINING, loss_of
from seams.options import effect
from seams.oracle import Objective, losses
from tiny_world import files
from transformers import TrainerCallback
from transformers.integrations import integration_utils
from transformers.models.llama import modeling_llama

ALL = "precompute, align, sft, evaluate, train-sae"


def record(folder: Path) -> dict[str, Any]:
    """`run.yaml`."""
    found: dict[str, Any] = yaml.safe_load((folder / "run.yaml").read_text())
    return found


@effect(ALL, "config")
def config(lab: Lab, command: str) -> None:
    """Settings of a file are used, those of its section for the command before the rest, and options before both."""
    path = lab.new("config.yaml")
    defaults = lab.defaults(command, {})
    content = {"model": str(defaults["model"]), "device": "cuda", "attention": "packed", "width": 96}
    path.write_text(yaml.safe_dump({**content, command: {"device": "cpu"}}))
    out = lab.new(command)
    result = lab.call(command, out, config=path, model=None, attention="eager")
    assert result.exit_code == 0, result.output
    found = record(out)
    assert [found[name] for name in ("model", "device", "attention")] == [content["model"], "cpu", "eager"]


@effect(ALL, "out")
def out(lab: Lab, command: str) -> None:
    """All that is written lies there; where something lies already it is refused."""
    folder = lab.run(command).folder
    assert record(folder)["out"] == str(folder)
    before = files(folder)
    changed = {"precompute": {"max_prompt_length": 20}}.get(command, {})
    assert lab.call(command, folder, **changed).exit_code == 2
    assert files(folder) == before


@effect(ALL, "device")
def device(lab: Lab, command: str) -> None:
    """`cpu` runs there, whatever else there is; a device that is none, or is not here, is refused."""
    folder = lab.run(command, device="cpu").folder
    if command == "precompute":
        assert open_cache(folder, sites=[]).manifest.numerics.device.startswith("cpu")
    elif command in ("align", "sft"):
        assert record(folder)["training_device"] == "cpu"
    assert "--device" in lab.refused(command, device="abacus")
    if not torch.cuda.is_available():
        assert "--device" in lab.refused(command, device="cuda")


def counted(which: str, function: Any, calls: dict[str, int]) -> Any:
    """A function that counts its calls."""

    def call(*args: Any, **kwargs: Any) -> Any:
        calls[which] += 1
        return function(*args, **kwargs)

    return call


@effect(ALL, "attention")
def attention(lab: Lab, command: str) -> None:
    """The implementation that is named is the one that runs."""
    made = {"cache": lab.run("precompute", model=lab.world.llama).folder}
    changes = made if command in ("align", "evaluate") else {}
    for name in ("eager", "packed"):
        calls = {"eager": 0, "packed": 0}

        with pytest.MonkeyPatch.context() as patch:
            eager = counted("eager", modeling_llama.eager_attention_forward, calls)
            patch.setattr(modeling_llama, "eager_attention_forward", eager)
            functions = modeling_llama.ALL_ATTENTION_FUNCTIONS
            known = functions[packed.PACKED]
            functions.register(packed.PACKED, counted("packed", known, calls))
            try:
                lab.run(command, attention=name, model=lab.world.llama, **changes)
            finally:
                functions.register(packed.PACKED, known)
        assert calls[name] > 0
        assert name == "packed" or calls["packed"] == 0  # eager runs in the check of packed rows too
    assert "--attention" in lab.refused(command, attention="none")


@effect("precompute, align, sft, evaluate, train-sae", "compile")
def compiled(lab: Lab, command: str) -> None:
    """Layers run compiled, here by a compiler that leaves them as they are; on a CPU only if asked."""
    for on in (True, False, None):
        calls = 0

        def fake(function: Any = None, **settings: Any) -> Any:
            def run(*args: Any, **kwargs: Any) -> Any:
                nonlocal calls
                calls += 1
                return function(*args, **kwargs)

            return run if function else fake

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "compile", fake)
            patch.setattr(flex, "BACKEND", f"none-{command}-{on}")
            found = lab.run(command, compile=on, token_budget=161)
        assert (calls > 0) == (on is True)
        if command in TRAINING:
            assert found.logged("loss") == lab.run(command, token_budget=161).logged("loss")


@effect("precompute, align, sft, evaluate", "dtype")
def dtype(lab: Lab, command: str) -> None:
    """bf16 is autocast with weights in fp32: the numbers are those of plain transformers under torch's autocast."""
    if command == "sft":
        run = lab.run(command, dtype="bf16")
        model = plain_model(lab.world.gemma)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            expected = loss_of(lab, command)(model).item()
        with torch.no_grad():
            exact = loss_of(lab, command)(model).item()
        assert abs(run.steps[0]["loss"] - expected) < 0.02 * abs(expected)
        assert run.steps[0]["loss"] != pytest.approx(exact, rel=1e-5)
        assert {weight.dtype for weight in run.weights(1).values()} == {torch.float32}
        return
    cache = lab.run("precompute", dtype="bf16")
    responses = [side for row in cache.open() for side in (row.chosen, row.rejected)]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model = plain_model(lab.world.gemma)
        values = losses(Objective("dpo"), model, model, lab.pairs())
    if command == "precompute":
        exact = [side.logp for row in lab.run(command).open() for side in (row.chosen, row.rejected)]
        by_hand = torch.stack([values["logps/chosen"], values["logps/rejected"]], 1).flatten().tolist()
        assert [side.logp for side in responses] == pytest.approx(by_hand, rel=0.02)
        assert all(abs(side.logp - one) > 1e-4 for side, one in zip(responses, exact, strict=True))
        assert cache.open().manifest.meaning.recipe == "bf16"
        return
    # What was scored under one recipe is not measured under another.
    assert "--dtype" in lab.refused(command, cache=cache.folder)
    assert "--dtype" in lab.refused(command, dtype="bf16")
    if command == "align":
        run = lab.run(command, dtype="bf16", cache=cache.folder)
        assert run.steps[0]["logps/chosen"] == pytest.approx(values["logps/chosen"].mean().item(), rel=0.02)
        assert {weight.dtype for weight in run.weights(1).values()} == {torch.float32}
    else:
        found = lab.run(command, dtype="bf16", cache=cache.folder, model=lab.world.gemma, reference=lab.world.gemma)
        assert found.metrics["kl/chosen"] == 0


@effect("align, sft", "model")
def model(lab: Lab, command: str) -> None:
    """Training starts from it."""
    changes = {"cache": lab.run("precompute", model=lab.other).folder} if command == "align" else {}
    run = lab.run(command, model=lab.other, lr=1e-30, max_steps=2, **changes)
    start = plain_model(lab.other).state_dict()
    assert all(torch.equal(start[name], weight) for name, weight in run.weights(2).items())


# What is said and kept meanwhile.


@effect(TRAINING, "logging_steps")
def logging_steps(lab: Lab, command: str) -> None:
    """A line every so many steps, and one of the first; each is a mean over the steps since the last."""
    every = lab.run(command, max_steps=5, seed=1).logged("loss")
    run = lab.run(command, max_steps=5, seed=1, logging_steps=2)
    assert [line["step"] for line in run.steps] == [1, 2, 4]
    assert run.logged("loss") == pytest.approx([every[0], every[1], (every[2] + every[3]) / 2], rel=1e-6)


@effect(TRAINING, "save_steps")
def save_steps(lab: Lab, command: str) -> None:
    """A checkpoint every so many steps, of which the last two are kept."""
    for every, kept in ((2, {4, 6}), (3, {3, 6})):
        run = lab.run(command, max_steps=6, save_steps=every)
        checkpoints = sorted(run.folder.glob("checkpoint-*"))
        assert {int(folder.name.removeprefix("checkpoint-")) for folder in checkpoints} == kept
        for folder in checkpoints:
            saved = plain_model(folder).state_dict()
            step = int(folder.name.removeprefix("checkpoint-"))
            assert all(torch.equal(saved[name], weight) for name, weight in run.weights(step).items())


@effect(TRAINING, "snapshot_steps")
def snapshot_steps(lab: Lab, command: str) -> None:
    """A model every so many steps, but not at the end."""
    whole = lab.run(command, max_steps=6, save_steps=2)
    run = lab.run(command, max_steps=6, snapshot_steps=2)
    assert sorted(folder.name for folder in (run.folder / "snapshots").iterdir()) == ["step-000002", "step-000004"]
    for step in (2, 4):
        assert all(torch.equal(weight, whole.weights(step)[name]) for name, weight in run.weights(step).items())
    assert not (lab.run(command, snapshot_steps=None).folder / "snapshots").exists()


@effect(TRAINING, "resume")
def resume(lab: Lab, command: str) -> None:
    """A run that was stopped goes on from its last checkpoint and ends as one in one go."""
    options = {"max_steps": 5, "batch_size": 1, "save_steps": 2, "seed": 2}
    whole, broken = lab.run(command, **options), lab.new("broken")
    steps = 0
    real = torch.optim.AdamW.step

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 4:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        assert lab.call(command, broken, **options).exit_code == 130
    before = [line["step"] for line in map(json.loads, (broken / "metrics.jsonl").read_text().splitlines())]
    assert max(before) == 3
    again = lab.call(command, broken, **options)
    assert again.exit_code == 2 and "--resume" in again.stderr
    assert lab.call(command, broken, resume=True, **options).exit_code == 0
    run = type(whole)(broken, "", whole.start)
    assert run.logged("loss") == whole.logged("loss")
    assert all(torch.equal(weight, whole.weights(5)[name]) for name, weight in run.weights(5).items())
    assert "--resume" in lab.refused(command, resume=True)


@effect(TRAINING, "report_to")
def report_to(lab: Lab, command: str) -> None:
    """The tracker gets what the file gets; one that is not installed is refused by name."""
    told: list[dict[str, Any]] = []

    class Tracker(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            told.append({"step": state.global_step, **logs})

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tensorboard", Tracker)
        run = lab.run(command, report_to="tensorboard")
    assert [line["loss"] for line in told if "loss" in line] == run.logged("loss")
    assert "--report-to" in lab.refused(command, report_to="comet_ml")


@effect(TRAINING, "push_to_hub")
def push_to_hub(lab: Lab, command: str) -> None:
    """The finished folder is uploaded, once."""
    pushed: list[float] = []

    def push(self: Any, *args: Any, **kwargs: Any) -> None:
        folder = Path(self.args.output_dir)
        if (folder / "model.safetensors").exists():
            pushed.append(plain_model(folder).model.norm.weight.sum().item())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            transformers.Trainer, "init_hf_repo", lambda self, *a, **k: setattr(self, "hub_model_id", "me/it")
        )
        patch.setattr(transformers.Trainer, "push_to_hub", push)
        lab.run(command, seed=31)
        assert pushed == []
        run = lab.run(command, seed=31, push_to_hub=True)
    assert pushed[-1] == run.weights(1)["model.norm.weight"].sum().item()
