"""Checks of the options of `train-sae`; what it reads is in of_data.py."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fpo.stages.model.sae import load_sae, parse_site
from pairs import score_alone
from safetensors.torch import load_file, save_file
from seams.lab import Lab, Run, by_hand, plain_model
from seams.options import effect
from tiny_world import SITES


def activations(lab: Lab, model: Path, site: str) -> torch.Tensor:
    """Activations of all responses at a site, by plain transformers."""
    policy = plain_model(model)
    with torch.no_grad():
        sides = [side for pair in by_hand(lab.rows) for side in score_alone(policy, pair, [parse_site(site)])]
    return torch.cat([side.acts[parse_site(site)] for side in sides])


@torch.no_grad()
def explained(run: Run, acts_TD: torch.Tensor) -> tuple[float, float]:
    """Explained variance and L0 of a trained SAE on activations."""
    sae: Any = load_sae(str(run.folder)).sae
    features = sae.encode(acts_TD)
    error = (acts_TD - sae.decode(features)).square().sum() / (acts_TD - acts_TD.mean(0)).square().sum()
    return 1 - float(error), float((features > 0).sum(1).float().mean())


def assert_each_explains_its_own(lab: Lab, runs: Sequence[Run], sources: Sequence[tuple[Path, str]]) -> None:
    for source in sources:
        acts = activations(lab, *source)
        best = max(range(len(runs)), key=lambda number, acts=acts: explained(runs[number], acts)[0])
        assert sources[best] == source


@effect("train-sae", "model")
def model(lab: Lab, command: str) -> None:
    models = (lab.world.gemma, lab.other)
    runs = [lab.run(command, model=path) for path in models]
    assert_each_explains_its_own(lab, runs, [(path, SITES[0].name) for path in models])


@effect("train-sae", "site")
def site(lab: Lab, command: str) -> None:
    names = [site.name for site in SITES]
    runs = [lab.run(command, site=name) for name in names]
    assert_each_explains_its_own(lab, runs, [(lab.world.gemma, name) for name in names])
    assert [load_sae(str(run.folder)).site.name for run in runs] == names
    assert "--site" in lab.refused(command, site=tuple(names))


@effect("train-sae", "width")
def width(lab: Lab, command: str) -> None:
    for number in (40, 56):
        folder = lab.run(command, width=number).folder
        assert json.loads((folder / "cfg.json").read_text())["d_sae"] == number
        assert load_file(folder / "sae_weights.safetensors")["W_enc"].shape == (32, number)


@effect("train-sae", "tokens")
def tokens(lab: Lab, command: str) -> None:
    """A step is 256 activations; how often that goes over the text is said."""
    real = torch.optim.Adam.step
    for number in (512, 1536):
        steps = 0

        def step(self: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal steps
            steps += 1
            return real(self, *args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.optim.Adam, "step", step)
            run = lab.run(command, tokens=number)
        assert steps == number // 256
        quality = json.loads((run.folder / "quality.json").read_text())
        whole = {
            (*pair.prompt_ids, *side) for pair in by_hand(lab.rows) for side in (pair.chosen_ids, pair.rejected_ids)
        }
        available = sum(len(ids) - 1 for ids in whole)  # without BOS
        assert quality["passes"] == pytest.approx(number / (available - quality["tokens"]))


@effect("train-sae", "target_l0")
def target_l0(lab: Lab, command: str) -> None:
    """About so many features fire a token."""
    acts = activations(lab, lab.world.gemma, SITES[0].name)
    for target in (4, 16):
        found = explained(lab.run(command, target_l0=target), acts)[1]
        assert target / 1.5 < found < 1.5 * target


@effect("train-sae", "seed")
def seed(lab: Lab, command: str) -> None:
    first, second, again = lab.run(command, seed=0), lab.run(command, seed=1), lab.new()
    assert lab.call(command, again, seed=0).exit_code == 0
    weights = [load_file(folder / "sae_weights.safetensors") for folder in (first.folder, again, second.folder)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not np.allclose(weights[0]["W_enc"], weights[2]["W_enc"])


@effect("precompute", "allow_poor_sae")
def allow_poor_sae(lab: Lab, command: str) -> None:
    dead = lab.new("dead")
    shutil.copytree(lab.world.saes[0], dead)
    weights = load_file(dead / "sae_weights.safetensors")
    save_file({**weights, "threshold": weights["threshold"] * 1e4}, dead / "sae_weights.safetensors")
    assert "--allow-poor-sae" in lab.refused(command, sae=dead)
    assert "L0 0.0," in lab.run(command, sae=dead, allow_poor_sae=True).said
