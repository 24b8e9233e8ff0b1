from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
import yaml
from fpo.pipeline.commands.jobs import DONE, Step
from fpo.pipeline.config import AlignConfig
from fpo.pipeline.config_files import COMMANDS, load_config, profile_names
from fpo.pipeline.report import preflight
from fpo.pipeline.report.hub import Repo
from fpo.pipeline.report.plan import make_plan, make_step
from fpo.pipeline.report.preflight import free_memory, missing, needed_repos
from fpo.pipeline.report_config import TableConfig
from transformers import AutoModelForCausalLM

REGISTRY = {"res": SimpleNamespace(repo_id="owner/saes", saes_map={"layer_1": "folder/1", "layer_2": "folder/2"})}


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(preflight, "_registry", lambda: REGISTRY)


@pytest.fixture
def make(world, tmp_path):
    """Makes a step that can run, but for the settings that are given."""

    def step(command: str = "precompute", *needs: Step, **changes) -> Step:
        options = {"model": str(world.gemma), "dataset": str(world.data), "sae": (str(world.saes[0]),)}
        options |= {"max_length": 64, "max_prompt_length": 32, "token_budget": 160, "cache": world.cache}
        config = COMMANDS[command]
        options = {
            name: value
            for name, value in {**options, **changes}.items()
            if name in config.model_fields and value is not None
        }
        return make_step(command, command, config(**options), tmp_path / "runs", *needs)

    return step


def only(lines: list[str], *parts: str) -> str:
    """The one line that there is, with these parts."""
    assert len(lines) == 1, lines
    for part in parts:
        assert part in lines[0]
    assert "\n" not in lines[0]
    return lines[0]


def test_nothing_is_missing_where_all_is_there(make, world):
    steps = [make("precompute"), make("align"), make("evaluate", reference=str(world.gemma)), make("train-sae")]
    assert missing(steps, jobs=1) == []


def test_what_an_earlier_step_writes_is_not_missing(make):
    sft = make("sft", dataset=None, seed=1)
    first = make("precompute")
    sae = make("train-sae", seed=2)
    steps = [first, sae, make("align", cache=first.out, sae=(str(sae.out),), model=str(sft.out), seed=3)]
    assert any(str(sft.out) in line for line in missing(steps, jobs=1))
    assert preflight.missing_files([sft, *steps], {step.out: step for step in (sft, *steps)}) == []


@pytest.mark.parametrize(
    ("command", "options", "parts"),
    [
        ("precompute", {"model": "./no/model"}, ["model", "no/model"]),
        ("precompute", {"model": "package:nobody_has_this/model.gguf"}, ["nobody_has_this", "install"]),
        ("precompute", {"dataset": "no/such/file.jsonl"}, ["dataset", "no/such/file.jsonl"]),
        ("train-sae", {"dataset": "./pairs"}, ["dataset", "./pairs"]),
        ("precompute", {"sae": ("saes/none",)}, ["sae", "saes/none", "train-sae"]),
        ("precompute", {"sae": ("none/params.npz@blocks.2.hook_resid_post",)}, ["sae", "none/params.npz"]),
        ("align", {"cache": Path("no/cache")}, ["cache", "no/cache", "fpo precompute"]),
        ("align", {"method": "tdpo2", "reference": "./none", "sae": ()}, ["model", "none"]),
        ("evaluate", {"questions": Path("none.json"), "outputs": "mt-bench"}, ["questions", "none.json"]),
        ("precompute", {"chat_template": "none.jinja"}, ["chat_template", "none.jinja"]),
    ],
)
def test_a_local_file_that_is_not_there_is_named(make, command, options, parts):
    only(missing([make(command, **options)], jobs=1), *parts)


def test_what_a_step_does_not_read_is_not_missing(make, world):
    steps = [
        make("align", method="dpo", sae=("saes/none",), dataset="no/such/file.jsonl"),
        make("sft", sae=("saes/none",)),
    ]
    assert preflight.missing_files(steps, {}) == []
    assert missing(steps[:1], jobs=1) == []


def test_steps_that_are_done_need_nothing(make):
    step = make("precompute", model="./no/model", sae=("saes/none",), dtype="bf16")
    assert len(missing([step], jobs=1)) == 3
    step.out.mkdir(parents=True)
    (step.out / DONE).write_text("{}")
    assert missing([step], jobs=1) == []


@pytest.mark.parametrize(
    ("spec", "parts"),
    [("ress:layer_1", ["release 'ress'", "'res'"]), ("res:layer_11", ["'layer_11'", "'layer_1'"])],
)
def test_an_sae_that_saelens_does_not_know_is_named_with_the_nearest(make, spec, parts):
    only(missing([make(sae=(spec,))], jobs=1), spec, *parts)


def test_the_hub_is_asked_for_what_is_needed_of_it_once(make, monkeypatch, world):
    asked: list[Repo] = []
    monkeypatch.setattr(preflight, "missing_repos", lambda repos: asked.extend(repos) or ["not given"])
    hub_data = "HuggingFaceH4/ultrafeedback_binarized"
    first = make(model="google/gemma-2-2b", dataset=hub_data, sae=("res:layer_2@blocks.2.hook_resid_post",))
    second = make("align", model="google/gemma-2-2b", sae=("res:layer_2",), seed=1)
    monkeypatch.setattr(preflight, "free_memory", lambda device: 10**15)
    only(missing([first, second], jobs=1), "not given")
    wanted = [Repo("model", "google/gemma-2-2b"), Repo("dataset", hub_data), Repo("model", "owner/saes", "folder/2")]
    assert sorted(asked, key=str) == sorted(wanted, key=str)
    first.out.mkdir(parents=True)
    (first.out / DONE).write_text("{}")
    assert Repo("dataset", hub_data) not in needed_repos([second], {first.out: first})


def test_a_gpu_s_recipes_are_refused_on_a_cpu(make):
    only(missing([make(dtype="bf16"), make("align", dtype="bf16")], jobs=1), "bf16", "fp32")
    only(missing([make(attention="packed_flex")], jobs=1), "packed_flex")


def test_a_device_that_is_not_here_is_all_that_is_said(make):
    only(missing([make(device="cuda", model="./no/model"), make(device="cuda", seed=1)], jobs=1), "--device", "cuda")


def test_memory_is_that_of_the_weights_and_states_of_the_jobs_that_run_together(make, world, monkeypatch):
    weights = sum(weight.numel() for weight in AutoModelForCausalLM.from_pretrained(world.gemma).parameters())
    adam, rmsprop = make("align", method="dpo", sae=()), make("align", method="dpo", sae=(), optimizer="rmsprop")
    live = make("align", method="tdpo2", sae=(), reference=str(world.llama))
    assert preflight.state_bytes(make(), {}) == 4 * weights
    assert preflight.state_bytes(adam, {}) == 16 * weights
    assert preflight.state_bytes(rmsprop, {}) == 12 * weights
    assert preflight.state_bytes(make("align", method="dpo", sae=(), lora_r=2), {}) == 4 * weights
    assert preflight.state_bytes(live, {}) == 20 * weights
    monkeypatch.setattr(preflight, "free_memory", lambda device: 20 * weights)
    assert missing([adam, rmsprop], jobs=1) == missing([adam], jobs=2) == []
    only(missing([adam, rmsprop], jobs=2), "memory", "--jobs", "2 at a time")
    monkeypatch.setattr(preflight, "free_memory", lambda device: 15 * weights)
    only(missing([adam], jobs=1), "memory", "--lora-r", "cpu")


def test_the_bytes_of_a_model_that_is_not_here_are_not_told(make):
    assert preflight.state_bytes(make(model="nobody/nothing"), {}) is None


def test_free_memory_is_the_gpu_s_on_a_gpu_and_the_machine_s_on_a_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (11, 80))
    assert free_memory("cuda:0") == 11
    assert 0 < free_memory("cpu") <= psutil.virtual_memory().total


def test_the_profiles_name_saes_that_saelens_has(monkeypatch):
    monkeypatch.undo()
    releases = preflight._registry()
    sites = {"res": "hook_resid_post", "mlp": "hook_mlp_out"}
    for name in profile_names():
        for command in (AlignConfig, TableConfig):
            config = load_config(command, name, {})
            for spec, site in zip(config.sae, config.site, strict=True):
                if not preflight._is_published(spec) or spec.startswith("embedded:"):
                    continue
                release, sae_id = spec.split(":")
                assert sae_id in releases[release].saes_map
                kind, layer = release.removesuffix("-canonical").rsplit("-", 1)[1], sae_id.split("/")[0].split("_")[1]
                assert site == f"blocks.{layer}.{sites[kind]}"


def test_the_comparison_on_gemma_2_2b_is_the_paper_s(tmp_path):
    plan = make_plan("gemma-2-2b", load_config(TableConfig, "gemma-2-2b", {"runs": tmp_path}))
    (sft,) = plan.base
    settings = sft.config
    assert (settings.model, settings.dataset) == ("google/gemma-2-2b", "HuggingFaceH4/ultrachat_200k")
    assert (settings.lr, settings.batch_size, settings.warmup_steps, settings.epochs) == (5e-7, 32, 150, 1)
    assert (settings.split, settings.max_length, settings.snapshot_steps) == ("train_sft", 2048, None)
    layers = [f"blocks.{layer}.{kind}" for layer in (7, 13, 19, 25) for kind in ("hook_resid_post", "hook_mlp_out")]
    assert [run.row for run in plan.site_ablation()][:8] == layers
    assert [run.row.count("+") for run in plan.sum_ablation()][:5] == [0, 1, 1, 1, 2]
    nine = make_plan("gemma-2-9b", load_config(TableConfig, "gemma-2-9b", {"runs": tmp_path}))
    assert not nine.site_ablation() and nine.base[0].config.optimizer == "rmsprop"
    assert yaml.safe_load((Path(preflight.__file__).parents[1] / "profiles" / "smollm2-135m.yaml").read_text())["table"]
