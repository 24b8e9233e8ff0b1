"""The plan of the comparison: for each row of a table, the commands that lead to it.

In: a profile. Out: steps, which `jobs.py` runs, and the folders of their results. A folder's name carries a hash of its
step's configuration, which names the folders of the steps before it. So other settings give another folder, and a step
that several tables share runs once.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ...cache.errors import UserError
from ...cache.files import canonical_json
from ...stages.train.methods import METHODS
from ..base_config import Config
from ..commands.jobs import Step
from ..config import AlignConfig, SFTConfig
from ..config_files import COMMANDS, has_section, load_config
from ..report_config import ComparisonConfig
from ..world.world import in_the_world, located, world_folder
from .style import LABELS

# The rows of the paper's comparison, and α = 0, which it lacks. The reference (SFT) is not trained: it has no options.
ROWS: dict[str, dict[str, Any] | None] = {
    "sft": None,
    "dpo": {"method": "dpo"},
    "tdpo1": {"method": "tdpo1"},
    "tdpo2": {"method": "tdpo2"},
    "simpo": {"method": "simpo"},
    "simpo-kl": {"method": "simpo-kl"},
    "fpo": {"method": "fpo"},
    "fpo-alpha0": {"method": "fpo", "alpha": 0.0},
}
ALPHAS = (0.1, 0.5, 1.0, 2.0)

WHERE = {"out", "resume"}  # options of a step on which its result does not depend


@dataclass(frozen=True)
class Run:
    """One row of a table under one seed.

    Attributes:
        row: the row's key.
        label: the row's name in tables and figures.
        seed: the seed of data order and sampling.
        train: the step that trains it; None for the reference.
        method: the objective; None for the reference.
    """

    row: str
    label: str
    seed: int
    train: Step | None
    method: str | None = None


@dataclass(frozen=True)
class Plan:
    """The steps of a profile.

    Attributes:
        name: the profile's name or file.
        config: its settings for `table` or `tune`.
        base: the fine-tuning (SFT) step, if the profile has one.
        base_model: the model before fine-tuning.
        model: the fine-tuned model: the reference, and the start of every policy.
        saes: the SAE at each site.
        world: the folder of the embedded world, which need not exist yet.
    """

    name: str
    config: Any
    base: tuple[Step, ...]
    base_model: str
    model: str
    saes: Mapping[str, str]
    world: Path

    @property
    def rows(self) -> dict[str, dict[str, Any] | None]:
        """The rows of the comparison with their options, those of the profile for a row of its own included."""
        return {row: options and {**options, **self.config.rows.get(row, {})} for row, options in ROWS.items()}

    def comparison(self) -> list[Run]:
        """All rows of the comparison under every seed; runs of the first seed save snapshots."""
        return [
            self.run(row, LABELS[row], seed, options, followed=seed == self.config.seeds[0])
            for seed in self.config.seeds
            for row, options in self.rows.items()
        ]

    def site_ablation(self) -> list[Run]:
        """Table 3, left: FPO with its constraint at one site, for each of the profile's sites."""
        return self._fpo_runs({site: {"site": (site,)} for site in self.config.ablation_sites})

    def weight_ablation(self) -> list[Run]:
        """Table 3, right: FPO for each α with and without stop-gradient, and for α = 0."""
        rows: dict[str, dict[str, Any]] = {"α = 0": {"alpha": 0.0}}
        for stop in (False, True):
            for alpha in ALPHAS:
                rows[f"α = {alpha:g}, {'with' if stop else 'without'} sg"] = {"alpha": alpha, "stop_gradient": stop}
        return self._fpo_runs(rows)

    def sum_ablation(self) -> list[Run]:
        """Table 7: FPO with its constraint at several sites at once."""
        return self._fpo_runs({sites: {"site": tuple(sites.split("+"))} for sites in self.config.ablation_sums})

    def _fpo_runs(self, rows: Mapping[str, dict[str, Any]]) -> list[Run]:
        """FPO under each row's settings and every seed; a run that the comparison has too is that one."""
        known = {_settings(run.train): run.train for run in self.comparison() if run.train}
        found = []
        for seed in self.config.seeds:
            for label, options in rows.items():
                run = self.run(label, label, seed, {"method": "fpo", **options})
                assert run.train is not None
                found.append(replace(run, train=known.get(_settings(run.train), run.train)))
        return found

    def run(self, row: str, label: str, seed: int, options: Mapping[str, Any] | None, *, followed: bool = False) -> Run:
        """One row under one seed.

        Args:
            row: its key.
            label: its name.
            seed: the seed.
            options: what differs from the profile's `align` section; None for the reference, which is not trained.
            followed: whether the run saves snapshots.
        """
        if options is None:
            return Run(row, label, seed, None)
        if not followed:
            options = {**options, "snapshot_steps": None}
        return Run(
            row, label, seed, self.training(f"{label}, seed {seed}", {**options, "seed": seed}), options["method"]
        )

    def training(self, label: str, options: Mapping[str, Any]) -> Step:
        """The step that trains a policy; `options` holds the method, the seed and all that differs from the profile."""
        config = self._load("align", {"model": self.model, "cache": self.train_cache.out, **options})
        sites = config.site if config.method == "fpo" else ()
        needed: dict[str, Any] = {"sae": tuple(self.saes[site] for site in sites), "site": sites}
        if METHODS[config.method].divergence == "kl":
            needed["reference"] = self.model
        return self._step("align", label, config.model_copy(update=needed), self.train_cache)

    def evaluation(self, run: Run, model: Path | None = None, **options: Any) -> Step:
        """The step that evaluates a run on the held-out cache.

        Args:
            run: the run.
            model: one of its snapshots; default its final model.
            options: options of `fpo evaluate` that differ from the profile's.
        """
        trained = model or (run.train.out if run.train else None)
        given: dict[str, Any] = {"model": str(trained or self.model), "reference": self.model, "seed": run.seed}
        given |= {"cache": self.heldout_cache.out, **options}
        given |= {} if run.method is None else {"method": run.method}
        config = self._load("evaluate", given)
        config = config.model_copy(update={"sae": tuple(self.saes[site] for site in config.site)})
        label = run.train.label.removeprefix("align ") if run.train else f"{run.label}, seed {run.seed}"
        label += f", {model.name}" if model else ""
        return self._step("evaluate", label, config, self.heldout_cache, *((run.train,) if run.train else ()))

    def sampling(self, run: Run, temperature: float) -> Step:
        """The step that samples answers at a temperature and measures nothing else that takes long."""
        label = f"{run.label}, seed {run.seed}, temperature {temperature:g}"
        given: dict[str, Any] = {"model": str(run.train.out if run.train else self.model), "seed": run.seed}
        given |= {"cache": self.heldout_cache.out, "temperature": temperature, "sae": (), "site": (), "top_k": 50}
        given |= {} if run.method is None else {"method": run.method}
        config = self._load("evaluate", given)
        return self._step("evaluate", label, config, self.heldout_cache, *((run.train,) if run.train else ()))

    def cache(self, split: str) -> Step:
        """Stage one over a split, with all of the profile's SAEs."""
        config = self._load("precompute", {"model": self.model, "split": split})
        config = located(config, self.world)
        config = config.model_copy(update={"sae": tuple(self.saes.values())})
        return self._step("precompute", split, config, *self.base)

    @cached_property
    def train_cache(self) -> Step:
        """The step that makes the training cache, which all methods share."""
        return self.cache(self.config.split)

    @cached_property
    def heldout_cache(self) -> Step:
        """The step that makes the held-out cache, on which all methods are evaluated."""
        return self.cache(self.config.heldout_split)

    def _load(self, command: str, given: Mapping[str, Any]) -> Any:
        return load_config(COMMANDS[command], self.name, given)

    def _step(self, command: str, label: str, config: Config, *needs: Step) -> Step:
        assert self.config.runs is not None
        return make_step(command, label, config, self.config.runs, *needs)


def _settings(train: Step) -> str:
    """The settings on which a training's result depends, as JSON: method defaults filled in, snapshots left out."""
    content = train.config.model_dump(mode="json", exclude={*WHERE, "snapshot_steps"})
    defaults = METHODS[train.config.method].defaults
    return canonical_json(content | {name: value for name, value in defaults.items() if content[name] is None})


def make_plan(name: str, config: ComparisonConfig, world: Path | None = None) -> Plan:
    """The plan of a profile.

    Args:
        name: the profile's name or file.
        config: its settings for `table` or `tune`, `runs` included.
        world: the folder of the embedded world; default the user's.

    Raises:
        UserError: the numbers of SAEs and sites differ, or a site that a method or ablation reads has no SAE.
    """
    has_sft = has_section(name, SFTConfig) and not in_the_world(config.model)
    world = world or world_folder()
    config = located(config, world)
    if len(config.sae) != len(config.site) or not config.sae:
        raise UserError(
            f"{name}: table: expected one site for each SAE, found {len(config.site)} sites and "
            f"{len(config.sae)} SAEs; list both, in the same order"
        )
    saes = dict(zip(config.site, config.sae, strict=True))
    wanted = {*load_config(AlignConfig, name, {}).site, *config.ablation_sites}
    wanted |= {site for sites in config.ablation_sums for site in sites.split("+")}
    if missing := sorted(wanted - set(saes)):
        raise UserError(f"{name}: table: expected an SAE at {', '.join(missing)}, found none; add it to sae and site")
    assert config.model is not None
    if not has_sft:
        return Plan(name, config, (), config.model, config.model, saes, world)
    assert config.runs is not None
    sft = make_step("sft", "sft", load_config(SFTConfig, name, {}), config.runs)
    return Plan(name, config, (sft,), config.model, str(sft.out), saes, world)


def make_step(command: str, label: str, config: Config, runs: Path, *needs: Step) -> Step:
    """A step in a folder of its own under `runs`."""
    content = config.model_dump(mode="json", exclude=WHERE)
    digest = hashlib.sha256(canonical_json([command, content]).encode()).hexdigest()[:10]
    slug = "-".join("".join(c if c.isalnum() or c in ".=+_" else " " for c in label).split())
    out = runs / f"{command}-{slug}-{digest}"
    return Step(
        command, f"{command} {label}", config.model_copy(update={"out": out}), tuple(step.out for step in needs)
    )
