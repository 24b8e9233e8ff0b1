from dataclasses import replace
from pathlib import Path

import pytest
from fpo.pipeline.config import RunConfig, load_config
from fpo.pipeline.report import estimates
from fpo.pipeline.report.estimates import duration, estimate_plan, print_plan
from fpo.pipeline.report.jobs import DONE, Step
from fpo.pipeline.report.plan import make_plan, make_step
from fpo.pipeline.report.rates import Rates
from tiny_world import SITES, rows, write_rows

GPU = Rates("a GPU", True, 989e12, 67e12, 3e12, 0.45, 0.55, 5e-4)
CPU = Rates("a CPU", False, 1e11, 1e11, 1e10, 0.6, 0.6, 1e-3)


@pytest.fixture
def on_gpu(monkeypatch):
    monkeypatch.setattr(estimates, "device_of", lambda config: "cuda:0")
    monkeypatch.setattr(estimates, "rates_of", lambda device, jobs: GPU)


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(estimates, "rates_of", lambda device, jobs: CPU)


def steps_of(name: str, runs: Path, ablations: bool = False) -> list[Step]:
    plan = make_plan(name, load_config(name, {"runs": runs}, "table"))
    trained = plan.comparison()
    if ablations:
        trained = [*plan.site_ablation(), *plan.weight_ablation(), *plan.sum_ablation()]
    steps = [*plan.base, plan.train_cache, plan.heldout_cache]
    steps += [step for run in trained for step in (run.train, plan.evaluation(run)) if step]
    return list({step.out: step for step in steps}.values())


@pytest.fixture
def small(world, tmp_path) -> list[Step]:
    """Two caches, three trainings that differ in the seed, a training with a KL, and their evaluations."""
    runs = tmp_path / "runs"
    base = {"model": str(world.gemma), "dataset": str(world.data), "dtype": "fp32", "max_length": 64}
    base |= {"max_prompt_length": 32, "token_budget": 160, "batch_size": 4, "prompts": 2, "samples": 2}
    caches = [
        make_step("precompute", split, RunConfig(**base, sae=tuple(map(str, world.saes)), split=split), runs)
        for split in ("train", "test")
    ]
    steps, named = (
        [*caches],
        dict.fromkeys(["FPO, seed 0", "FPO, seed 1", "FPO, seed 2"], ("fpo", (str(world.saes[0]),))),
    )
    for label, (method, saes) in {**named, "TDPO-1": ("tdpo1", ())}.items():
        options = {**base, "method": method, "sae": saes, "seed": len(steps), "cache": caches[0].out}
        options |= {"reference": str(world.gemma)} if method == "tdpo1" else {}
        train = make_step("align", label, RunConfig(**options), runs, caches[0])
        options |= {"model": str(train.out), "cache": caches[1].out, "reference": str(world.gemma)}
        steps += [train, make_step("evaluate", label, RunConfig(**options), runs, train, caches[1])]
    return steps


def finish(step: Step) -> None:
    step.out.mkdir(parents=True)
    (step.out / DONE).write_text("{}")


def test_a_plan_is_estimated_before_anything_of_it_exists(small, on_cpu):
    found = estimate_plan(small, jobs=2)
    assert [one.step for one in found.steps] == small
    assert all(one.cost.memory > 0 and one.cost.seconds > 0 for one in found.steps)
    assert found.seconds == pytest.approx(sum(one.cost.seconds for one in found.steps) / 2)
    assert found.disk == sum(one.cost.disk for one in found.steps)
    assert found.memory == 2 * max(one.cost.memory for one in found.steps)
    assert estimate_plan(small, jobs=100).memory == len(small) * max(one.cost.memory for one in found.steps)


def test_jobs_share_a_gpu(small, on_gpu):
    assert estimate_plan(small, jobs=2).seconds == estimate_plan(small, jobs=1).seconds


def test_done_steps_cost_nothing(small, on_cpu, capsys):
    before = estimate_plan(small, jobs=1)
    finish(small[2])
    after = estimate_plan(small, jobs=1)
    assert (after.steps[2].cost.seconds, after.steps[2].cost.disk, after.steps[2].cost.memory) == (0, 0, 0)
    assert after.seconds == pytest.approx(before.seconds - before.steps[2].cost.seconds)
    assert after.disk == pytest.approx(before.disk - before.steps[2].cost.disk)
    for step in (*small[:2], *small[3:]):
        finish(step)
    nothing = estimate_plan(small, jobs=3)
    assert (nothing.seconds, nothing.disk, nothing.memory) == (0, 0, 0)
    print_plan(nothing)
    assert f"0 to do, {len(small)} done" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("smaller", "larger"),
    [
        ({"limit": 3}, {}),
        ({"max_steps": 1}, {}),
        ({}, {"epochs": 3}),
        ({}, {"samples": 9}),
        ({}, {"max_new_tokens": 900}),
    ],
)
def test_settings_that_say_how_much_is_done_are_heeded(small, on_cpu, smaller, larger):
    def seconds(options):
        changed = [replace(step, config=step.config.model_copy(update=options)) for step in small]
        return estimate_plan(changed, jobs=1).seconds

    assert seconds(smaller) < seconds(larger)


def test_what_steps_read_is_named_by_what_writes_it(small, on_cpu):
    found = estimate_plan(small, jobs=1).steps
    assert found[0].reads[-1] == "2 SAEs" and found[0].reads[1].endswith("data.jsonl")
    assert found[2].reads[1:] == ("cache train", "1 SAE")
    assert found[3].reads[0] == "align FPO" and found[3].reads[2] == "cache test"
    assert "SAE" not in "".join(found[-2].reads)


def test_a_snapshot_of_a_step_has_that_step_s_shape(small, on_cpu):
    train, evaluation = small[2:4]
    moved = evaluation.config.model_copy(update={"model": str(train.out / "snapshots" / "step-000002")})
    both = estimate_plan([*small, replace(evaluation, config=moved)], jobs=1).steps
    assert both[-1].cost == both[3].cost


def test_steps_that_differ_in_the_seed_are_one_line(small, on_cpu, capsys):
    finish(small[2])
    print_plan(estimate_plan(small, jobs=1))
    said = capsys.readouterr().out
    assert "align FPO ×3 (1 done)" in " ".join(said.split())
    assert said.count("align-FPO-…") == 1 and "seed" not in said
    assert str(small[0].out.parent) in said and str(small[0].out) not in said
    assert "7 to do" not in said and "9 to do, 1 done" in said
    assert "data.jsonl, train: 14 rows" in said and "60%" in said


@pytest.mark.parametrize("ablations", [False, True])
@pytest.mark.parametrize("name", ["gemma-2-2b", "gemma-2-9b"])
def test_the_paper_s_comparison_is_told_in_lines_of_a_readable_length(name, ablations, tmp_path, on_gpu, capsys):
    steps = steps_of(name, tmp_path / "runs", ablations)
    found = estimate_plan(steps, jobs=1)
    print_plan(found)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 120
    assert any("google/gemma-2" in line for line in lines) and "61,135 rows" in " ".join(lines)
    for label in ("align FPO", "align TDPO-1", "evaluate SFT") if not ablations else ("align α = 1, with sg",):
        assert label in " ".join(" ".join(lines).split())


def test_an_epoch_of_fpo_on_gemma_2_2b_takes_hours_on_one_h100(tmp_path, on_gpu):
    steps = steps_of("gemma-2-2b", tmp_path / "runs")
    found = {one.step.label: one.cost for one in estimate_plan(steps, jobs=1).steps}
    fpo, tdpo = found["align FPO, seed 0"], found["align TDPO-2, seed 0"]
    assert 0.5 * 3600 < fpo.seconds < 4 * 3600 and 45e9 < fpo.memory < 80e9
    assert tdpo.seconds > fpo.seconds and tdpo.memory > fpo.memory
    # Eleven SAEs in fp32 take longer than the model in bf16.
    assert found["precompute train_prefs"].memory > 4 * 2.6e9 + 11 * 4 * 2 * 2304 * 16_384
    # The result, two checkpoints of three times its size, and nine snapshots, in fp32.
    assert fpo.disk == pytest.approx((1 + 2 * 3 + 9) * 4 * 2_614_341_888)


def test_the_width_of_an_sae_is_that_of_its_maker_its_folder_or_its_name(world, tmp_path):
    maker = make_step("train-sae", "one", RunConfig(width=300), tmp_path)
    makers = {maker.out: maker}
    names = (
        "release:layer_0/width_65k/canonical",
        "release:layer_1_width_1m_l0_big",
        "file.npz@blocks.0.hook_resid_post",
    )
    found = [estimates._width(name, makers) for name in (str(maker.out), str(world.saes[0]), *names)]
    assert found == [300, 64, 65_536, 1_048_576, 16_384]


def test_an_sae_can_be_trained_in_a_plan(world, tmp_path, on_cpu):
    options = {"model": str(world.gemma), "dataset": str(write_rows(tmp_path / "data.jsonl", rows(0, 4)))}
    step = make_step("train-sae", "sae", RunConfig(**options, site=(SITES[0].name,), width=64, tokens=500), tmp_path)
    assert estimate_plan([step], jobs=1).disk == 4 * 2 * 32 * 64


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (89, "89 s"), (90, "1.5 min"), (7200, "2.0 h"), (40 * 3600, "40.0 h"), (2e6, "23.1 days")],
)
def test_durations_are_said_in_a_person_s_units(seconds, text):
    assert duration(seconds) == text
