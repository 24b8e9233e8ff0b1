from pathlib import Path
from typing import Any

import pytest
import yaml
from fpo.pipeline.commands.jobs import Step
from fpo.pipeline.config import AlignConfig, SFTConfig
from fpo.pipeline.config_files import COMMANDS, load_config, write_yaml
from fpo.pipeline.report.plan import ROWS, WHERE, Plan, Run, make_plan, make_step
from fpo.pipeline.report_config import TableConfig
from fpo.stages.train.methods import METHODS
from hypothesis import assume, given
from hypothesis import strategies as st
from pairs import many_examples
from tiny_profile import NAMES, tiny_profile

# Some fields that matter to every step, with values to change them to.
FIELDS: dict[str, list[Any]] = {
    "lr": [1e-3, 1e-4],
    "seed": [0, 1, 7],
    "beta": [None, 0.1, 2.0],
    "alpha": [None, 0.0],
    "stop_gradient": [None, False],
    "site": [(), ("a",), ("a", "b"), ("b", "a")],
    "batch_size": [64, 128],
    "dtype": ["fp32", "bf16"],
    "max_steps": [None, 9],
    "model": ["one", "two"],
    "cache": [None, Path("one"), Path("two")],
    "lora_r": [None, 1],
}
IRRELEVANT: dict[str, list[Any]] = {
    "out": [Path("here"), Path("elsewhere")],
    "resume": [False, True],
}
settings = st.fixed_dictionaries({name: st.sampled_from(values) for name, values in FIELDS.items()})
surroundings = st.fixed_dictionaries({name: st.sampled_from(values) for name, values in IRRELEVANT.items()})


@pytest.fixture
def profile(world, tmp_path):
    """Writes the tiny profile, with changes, and makes its plan."""

    def make(command: str = "table", **changes: Any) -> Plan:
        path = str(tiny_profile(world, tmp_path, **changes))
        return make_plan(path, load_config(COMMANDS[command], path, {"runs": tmp_path / "runs"}))

    return make


def trainings(runs: list[Run]) -> dict[tuple[str, int], Step]:
    return {(run.row, run.seed): run.train for run in runs if run.train is not None}


def folders(plan: Plan) -> dict[str, Path]:
    """Every folder of the comparison, by command and label."""
    found = [*plan.base, plan.train_cache, plan.heldout_cache]
    for run in plan.comparison():
        found += [plan.evaluation(run), *([run.train] if run.train else [])]
    return {step.label: step.out for step in found}


def changed(old: dict[str, Path], new: dict[str, Path]) -> set[str]:
    assert old.keys() == new.keys()
    return {label for label in old if old[label] != new[label]}


# Folders.


@many_examples
@given(settings, settings, surroundings, surroundings)
def test_folders_are_equal_exactly_where_settings_are(one, other, here, there):
    steps = [
        make_step("align", "FPO, seed 0", AlignConfig(**options, **around), Path("runs"))
        for options, around in ((one, here), (other, there))
    ]
    assert (steps[0].out == steps[1].out) == (one == other)


def test_the_settings_that_do_not_matter_are_those_named():
    assert set(IRRELEVANT) == WHERE


@many_examples
@given(settings, st.sampled_from([*FIELDS]))
def test_one_changed_setting_gives_another_folder(options, name):
    others = [value for value in FIELDS[name] if value != options[name]]
    assume(others)
    made = [
        make_step("align", "FPO", AlignConfig(**{**options, name: value}), Path("runs")).out
        for value in (options[name], *others)
    ]
    assert len(set(made)) == len(made)


def test_another_command_has_another_folder():
    one, other = (make_step(config.command, "same", config(), Path("runs")) for config in (SFTConfig, AlignConfig))
    assert one.out != other.out and one.out.name.split("-")[-1] != other.out.name.split("-")[-1]


@many_examples
@given(st.text(max_size=20))
def test_a_folder_lies_in_the_runs_whatever_its_label(label):
    step = make_step("align", label, AlignConfig(), Path("runs"))
    assert step.out.parent == Path("runs") and step.config.out == step.out
    assert not set(step.out.name) & set('/\\:*?"<>| \n\0')


def test_the_same_profile_gives_the_same_folders(profile):
    assert changed(folders(profile()), folders(profile())) == set()


@pytest.mark.parametrize("change", [{"max_length": 63}, {"limit": 5}, {"keep_features": 40}])
def test_other_data_changes_every_folder(profile, change):
    before = folders(profile())
    assert changed(before, folders(profile(**change))) == set(before)


def test_another_setting_of_one_method_changes_that_method_alone(profile, world, tmp_path):
    before = folders(profile())
    path = tiny_profile(world, tmp_path)
    content = yaml.safe_load(path.read_text())
    content["methods"] = {"tdpo1": {"beta": 0.3}}
    path.write_text(write_yaml(content))
    after = make_plan(str(path), load_config(TableConfig, str(path), {"runs": tmp_path / "runs"}))
    assert changed(before, folders(after)) == {"align TDPO-1, seed 0", "evaluate TDPO-1, seed 0"}


def test_more_seeds_or_jobs_leave_what_is_there(profile):
    before = folders(profile())
    assert before.items() <= folders(profile(table={"seeds": [0, 1], "jobs": 1})).items()


def test_snapshots_are_evaluated_apart_from_the_end(profile):
    plan = profile()
    run = plan.comparison()[1]
    assert run.train is not None
    snapshot = run.train.out / "snapshots" / "step-000001"
    steps = [plan.evaluation(run), plan.evaluation(run, prompts=0), plan.evaluation(run, snapshot, prompts=0)]
    assert len({step.out for step in steps}) == 3
    assert steps[2].config.model == str(snapshot) and steps[2].label.endswith("step-000001")
    assert [step.config.prompts for step in steps] == [2, 0, 0]


# What steps consist of.


@pytest.mark.parametrize("method", METHODS)
def test_each_method_gets_what_it_needs_and_no_more(profile, world, method):
    step = profile().run(method, method, 0, {"method": method}).train
    assert (step.config.reference == str(world.gemma)) == (METHODS[method].divergence == "kl")
    expected = ((str(world.saes[0]),), (NAMES[0],)) if method == "fpo" else ((), ())
    assert (step.config.sae, step.config.site) == expected
    if method != "fpo" and METHODS[method].divergence != "kl":
        assert step.config.reference is None


def test_every_method_is_trained_on_the_same_cache_and_measured_on_another(profile):
    plan = profile()
    for run in plan.comparison():
        evaluation = plan.evaluation(run)
        assert evaluation.config.cache == plan.heldout_cache.out != plan.train_cache.out
        assert evaluation.config.reference == plan.model and plan.heldout_cache.out in evaluation.needs
        if run.train is None:
            assert evaluation.config.model == plan.model
            continue
        assert run.train.config.cache == plan.train_cache.out and run.train.needs == (plan.train_cache.out,)
        assert evaluation.config.model == str(run.train.out) and run.train.out in evaluation.needs
        assert evaluation.config.method == run.method
    assert {split.config.split for split in (plan.train_cache, plan.heldout_cache)} == {"train_prefs", "test_prefs"}


def test_rows_differ_in_the_method_and_seeds_in_the_seed_alone(profile):
    runs = trainings(profile(table={"seeds": [3, 4]}).comparison())
    assert set(runs) == {(row, seed) for row in ROWS if row != "sft" for seed in (3, 4)}
    where = {"out", "seed", "snapshot_steps"}
    for row in ROWS:
        if row != "sft":
            one, other = (runs[row, seed].config.model_dump(exclude=where) for seed in (3, 4))
            assert one == other and runs[row, 4].config.seed == 4
    differ = {"out", "method", "alpha", "sae", "site", "reference"}
    assert len({repr(runs[row, 3].config.model_dump(exclude=differ)) for row in ROWS if row != "sft"}) == 1
    assert runs["fpo-alpha0", 3].config.alpha == 0 and runs["fpo", 3].config.alpha is None


def test_only_the_first_seed_is_followed_over_training(profile):
    runs = trainings(profile(table={"seeds": [5, 0]}).comparison())
    assert {seed: step.config.snapshot_steps for (_, seed), step in runs.items()} == {5: 1, 0: None}


def test_fine_tuning_comes_first_where_the_profile_has_it(profile, world, tmp_path):
    path = tiny_profile(world, tmp_path)
    content = yaml.safe_load(path.read_text())
    content["sft"] = {"split": "train_sft", "snapshot_steps": None}
    path.write_text(write_yaml(content))
    plan = make_plan(str(path), load_config(TableConfig, str(path), {"runs": tmp_path / "runs"}))
    (sft,) = plan.base
    assert (plan.base_model, plan.model) == (str(world.gemma), str(sft.out))
    assert (sft.config.model, sft.config.split) == (str(world.gemma), "train_sft")
    assert plan.train_cache.needs == plan.heldout_cache.needs == (sft.out,)
    assert all(run.train.config.model == plan.model for run in plan.comparison() if run.train)
    assert not profile().base


# Ablations.


def test_the_ablations_are_those_of_the_paper_and_one_more(profile):
    plan = profile()
    assert [run.train.config.site for run in plan.site_ablation()] == [(name,) for name in NAMES]
    assert [run.train.config.site for run in plan.sum_ablation()] == [tuple(NAMES)]
    assert len(plan.sum_ablation()[0].train.config.sae) == 2
    weights = [(run.train.config.alpha, run.train.config.stop_gradient) for run in plan.weight_ablation()]
    resolved = [(0.5 if alpha is None else alpha, stop is not False) for alpha, stop in weights]
    assert resolved == [(0.0, True), *((alpha, stop) for stop in (False, True) for alpha in (0.1, 0.5, 1.0, 2.0))]


def test_ablations_share_what_the_comparison_has_trained(profile):
    plan = profile(table={"seeds": [0, 1]})
    compared = trainings(plan.comparison())
    sites, weights = trainings(plan.site_ablation()), trainings(plan.weight_ablation())
    for seed in (0, 1):
        assert sites[NAMES[0], seed] == weights["α = 0.5, with sg", seed] == compared["fpo", seed]
        assert weights["α = 0", seed] == compared["fpo-alpha0", seed]
    shared = [*sites.values(), *weights.values(), *trainings(plan.sum_ablation()).values()]
    assert len(set(shared)) == 2 * (2 + 9 + 1 - 1)  # FPO itself stands twice
    assert len(set(shared) - set(compared.values())) == 2 * (12 - 3)
    one, other = plan.comparison()[6], plan.site_ablation()[0]
    assert plan.evaluation(one) == plan.evaluation(other) and other.label == NAMES[0]


def test_runs_of_ablations_alone_save_no_snapshots(profile):
    plan = profile()
    compared = set(trainings(plan.comparison()).values())
    for runs in (plan.site_ablation(), plan.weight_ablation(), plan.sum_ablation()):
        alone = set(trainings(runs).values()) - compared
        assert {step.config.snapshot_steps for step in alone} == {None}


# Mistakes.


@pytest.mark.parametrize(
    ("table", "parts"),
    [
        ({"site": NAMES[:1]}, ["found 1 sites and 2 SAEs"]),
        ({"sae": [], "site": []}, ["found 0 sites and 0 SAEs"]),
        ({"ablation_sites": ["blocks.0.hook_mlp_out"]}, ["an SAE at blocks.0.hook_mlp_out"]),
        ({"ablation_sums": [f"{NAMES[0]}+blocks.0.hook_mlp_out"]}, ["an SAE at blocks.0.hook_mlp_out"]),
    ],
)
def test_saes_that_do_not_fit_the_sites_are_told_in_one_line(profile, table, parts):
    with pytest.raises(ValueError, match=r"\A[^\n]*tiny.yaml: table: [^\n]*; [^\n]*\Z") as caught:
        profile(table=table)
    for part in parts:
        assert part in str(caught.value)


def test_the_methods_own_site_needs_an_sae(profile):
    with pytest.raises(ValueError, match=r"\A[^\n]*expected an SAE at blocks.0.hook_resid_post, found none[^\n]*\Z"):
        profile(site=["blocks.0.hook_resid_post"])
