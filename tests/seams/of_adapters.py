"""Checks of the options of LoRA: what is trained, how it is scaled, and the model that it makes with its base."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from seams.lab import Lab, Run, plain_model
from seams.options import effect
from seams.oracle import Objective, losses
from tiny_world import fpo, ran
from torch import Tensor
from transformers import PreTrainedModel

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LAYERS = 4
WEIGHTS = "adapter_model.safetensors"


def adapter(lab: Lab, steps: int = 2, **options: Any) -> Run:
    return lab.run("align", **{"lora_r": 2, "lr": 1e-2, "max_steps": steps, **options})


def merged_by_hand(run: Run, scale: float, targets: tuple[str, ...] = LINEAR) -> dict[str, Tensor]:
    """The base's weights with scale · B A added to the linear layers that are targets, and to no other."""
    weights, parts = run.weights(0), load_file(run.folder / WEIGHTS)
    names = [name for name in parts if name.endswith("lora_A.weight")]
    assert len(names) == LAYERS * len(targets) == len(parts) / 2
    for name in names:
        assert name.split(".")[-3] in targets
        change = parts[name.replace("lora_A", "lora_B")] @ parts[name]
        assert float(change.abs().max()) > 1e-4
        weights[name.removeprefix("base_model.model.").replace("lora_A.", "")] += scale * change
    return weights


def by_hand(lab: Lab, run: Run, scale: float, targets: tuple[str, ...] = LINEAR) -> PreTrainedModel:
    """The adapted model, by hand."""
    policy = plain_model(lab.world.gemma)
    policy.load_state_dict(merged_by_hand(run, scale, targets), strict=False)
    return policy


def assert_trained_so(lab: Lab, scale: float, targets: tuple[str, ...] = LINEAR, **options: Any) -> None:
    """The second step's loss is that of the base with the first step's adapter, added by hand."""
    first, run = adapter(lab, 1, **options), adapter(lab, 2, **options)
    with torch.no_grad():
        policy = by_hand(lab, first, scale, targets)
        values = losses(Objective("dpo"), policy, plain_model(lab.world.gemma), lab.pairs())
    for name in ("loss", "logps/chosen", "logps/rejected"):
        assert run.steps[1][name] == pytest.approx(values[name].mean().item(), rel=1e-3), name


@effect("align", "lora_r")
def lora_r(lab: Lab, command: str) -> None:
    """An adapter of this rank on every linear layer, of scale α/r = 2 in the file and in training; no whole model."""
    for rank in (2, 5):
        run = adapter(lab, lora_r=rank)
        config = json.loads((run.folder / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"]) == (rank, 2 * rank)
        parts = load_file(run.folder / WEIGHTS)
        assert {part.shape[0] for name, part in parts.items() if "lora_A" in name} == {rank}
        assert not (run.folder / "model.safetensors").exists()
        assert_trained_so(lab, 2.0, lora_r=rank)


@effect("align", "lora_alpha")
def lora_alpha(lab: Lab, command: str) -> None:
    """Over r the scale of what is added, in training and in the file."""
    for alpha in (1, 6):
        config = json.loads((adapter(lab, lora_alpha=alpha).folder / "adapter_config.json").read_text())
        assert config["lora_alpha"] == alpha
        assert_trained_so(lab, alpha / 2, lora_alpha=alpha)
    assert "--lora-alpha" in lab.refused(command, lora_alpha=2)


@effect("align", "lora_targets")
def lora_targets(lab: Lab, command: str) -> None:
    for targets in (("q_proj",), ("v_proj", "down_proj")):
        assert_trained_so(lab, 2.0, targets, lora_targets=targets)
    assert "--lora-targets" in lab.refused(command, lora_r=2, lora_targets="nothing")


@effect("align", "lora_dropout")
def lora_dropout(lab: Lab, command: str) -> None:
    """Of the adapter's input that share is left out, in training alone: B's gradient is that of the rest, scaled."""
    seen: list[float] = []
    real = torch.nn.functional.dropout

    def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        found = real(input, p, training, inplace)
        if p and training and torch.is_grad_enabled():
            seen.append(float((found == 0).double().mean()))
            kept = found != 0
            torch.testing.assert_close(found[kept], input[kept] / (1 - p))
        return found

    for share in (0.25, 0.6):
        seen.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.nn.functional, "dropout", dropout)
            run = adapter(lab, lora_dropout=share)
        assert len(seen) >= LAYERS * len(LINEAR)
        assert sum(seen) / len(seen) == pytest.approx(share, abs=0.02)
        assert json.loads((run.folder / "adapter_config.json").read_text())["lora_dropout"] == share
        assert run.steps[0]["loss"] == adapter(lab).steps[0]["loss"]  # B begins at 0
    assert "--lora-dropout" in lab.refused(command, lora_dropout=0.5)


@effect("align", "merge")
def merge(lab: Lab, command: str) -> None:
    """The base's weights plus α/r B A, by hand."""
    for options, scale in (({}, 2.0), ({"lora_alpha": 3}, 1.5)):
        merged = adapter(lab, merge=True, **options)
        assert not (merged.folder / WEIGHTS).exists()
        assert_weights(merged.folder, merged_by_hand(adapter(lab, **options), scale))
    assert "--merge" in lab.refused(command, merge=True)


def assert_weights(folder: Path, expected: dict[str, Tensor]) -> None:
    found = load_file(folder / "model.safetensors")
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-5, atol=1e-6)


@effect("merge", "run", "out", "base")
def merge_afterwards(lab: Lab, command: str) -> None:
    """Afterwards too; a base that moved is found where `--base` says, and has to be the adapter's."""
    run = adapter(lab, lora_alpha=3)
    expected = merged_by_hand(run, 1.5)
    moved, copy = lab.new("base"), lab.new("adapter")
    shutil.copytree(lab.world.gemma, moved)
    shutil.copytree(run.folder, copy)
    path = copy / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "/nowhere/at/all"}))
    outs = [lab.new("merged") for _ in range(3)]
    ran(fpo(command, run.folder, "--out", outs[0]))
    ran(fpo(command, copy, "--out", outs[1], "--base", moved))
    for out in outs[:2]:
        assert_weights(out, expected)
    for options in ((copy,), (run.folder, "--base", lab.other), (lab.world.gemma,)):
        result = fpo(command, *options, "--out", outs[2])
        assert result.exit_code == 2 and not outs[2].exists()
    assert fpo(command, run.folder, "--out", outs[0]).exit_code == 2


@effect("evaluate", "base")
def base(lab: Lab, command: str) -> None:
    """The model that the adapter is measured on; without it, the one that the adapter names."""
    run = adapter(lab, lora_alpha=3)
    moved = lab.new("base")
    shutil.copytree(lab.world.gemma, moved)
    with torch.no_grad():
        values = losses(Objective("dpo"), by_hand(lab, run, 1.5), plain_model(lab.world.gemma), lab.pairs())
    for options in ({}, {"base": moved}):
        found = lab.run(command, model=run.folder, reference=lab.world.gemma, **options)
        with torch.no_grad():
            kl = losses(Objective("tdpo1"), by_hand(lab, run, 1.5), plain_model(lab.world.gemma), lab.pairs())
        assert found.metrics["kl/chosen"] == pytest.approx(kl["kl_chosen"].mean().item(), rel=1e-3)
        lengths = torch.tensor([[len(pair.chosen_ids), len(pair.rejected_ids)] for pair in lab.pairs()])
        raw = values["logps/chosen"] / lengths[:, 0] > values["logps/rejected"] / lengths[:, 1]
        assert found.metrics["accuracy/raw"] == pytest.approx(raw.double().mean().item())
    assert "--base" in lab.refused(command, model=run.folder, base=lab.other)
    assert "--base" in lab.refused(command, base=lab.world.gemma)
