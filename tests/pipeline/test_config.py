from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from fpo.pipeline.cli import app
from fpo.pipeline.config import COMMANDS, RunConfig, has_section, load_config, profile_names, to_yaml
from fpo.pipeline.plain_yaml import write_yaml
from fpo.stages.train.methods import METHODS
from hypothesis import given
from hypothesis import strategies as st
from pairs import many_examples

# PyYAML does not read back every control character and line separator that it writes.
names = st.text(st.characters(exclude_categories=["C", "Zl", "Zp"]))
PROFILES = ["embedded", "gemma-2-2b", "gemma-2-9b", "gemma-3-1b-it", "gemma-3-270m", "gemma-3-270m-it", "smollm2-135m"]
STAGES = ("precompute", "align", "sft", "evaluate", "train-sae")
# What only the comparison reads, from a file; `fpo table` and `fpo tune` have few options.
OF_THE_COMPARISON = {"seeds", "heldout_split", "validation_split", "ablation_sites", "ablation_sums", "jobs", "runs"}


def options_of(*names: str) -> set[str]:
    """The flags of a command."""
    command: Any = typer.main.get_command(app)
    for name in names:
        command = command.commands[name]
    return {parameter.opts[0] for parameter in command.params}


def field_of(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


@pytest.mark.parametrize("name", PROFILES)
def test_every_profile_loads(name):
    config = load_config(name, {})
    assert config.model
    assert config.dataset == ("embedded:data" if name == "embedded" else "HuggingFaceH4/ultrafeedback_binarized")
    assert len(config.sae) == len(config.site) > 0
    for command in COMMANDS:
        assert load_config(name, {}, command).model


def test_the_profiles_are_those_that_the_help_names():
    assert profile_names() == sorted(PROFILES)


def test_the_paper_s_settings_are_those_of_its_table_5():
    config = load_config("gemma-2-2b", {})
    assert (config.batch_size, config.lr, config.warmup_steps, config.epochs) == (32, 5e-7, 150, 1.0)
    assert (config.lr_scheduler, config.optimizer, config.activation_checkpointing) == (
        "constant_with_warmup",
        "adam",
        True,
    )
    assert (config.top_k, config.site) == (50, ("blocks.25.hook_resid_post",))
    assert load_config("gemma-2-9b", {}).optimizer == "rmsprop"


def test_an_option_wins_over_the_file(tmp_path):
    (tmp_path / "run.yaml").write_text("lr: 1.0e-3\nbatch-size: 8\n")
    config = load_config(str(tmp_path / "run.yaml"), {"lr": "2e-5"})
    assert (config.lr, config.batch_size) == (2e-5, 8)
    assert load_config(str(tmp_path / "run.yaml"), {}).lr == 1e-3


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("metod: fpo\n", ["'metod'", "'method'"]),
        ("learning-rate: 1\n", ["'learning_rate'", "nearest"]),
        ("method: ipo\n", ["method", "'ipo'", "'simpo'"]),
        ("lr: fast\n", ["lr", "'fast'"]),
        ("lr: -1\n", ["lr", "-1"]),
        ("lr: .inf\n", ["lr", "finite"]),
        ("alpha: .nan\n", ["alpha", "nan"]),
        ("batch_size: 1.5\n", ["batch_size", "1.5"]),
        ("max_steps: 0\n", ["max_steps", "0"]),
        ("keep_features: most\n", ["keep_features", "'most'"]),
        ("sae: one\n", ["sae", "'one'"]),
        ("lr: 1\nlr: 2\n", ["'lr'", "twice"]),
        ("max-length: 1\nmax_length: 2\n", ["max_length", "twice"]),
        ("lr: !!python/object:os.system {}\n", ["python/object", "run.yaml"]),
        ("model: !!python/name:os.system\n", ["python/name", "run.yaml"]),
        ("lr: [1\n", ["run.yaml"]),
        ("{[1]: 2}\n", ["run.yaml"]),
        ("a: &a [*a]\n", ["'*a'", "line 1"]),
        ("- lr\n", ["mapping", "list"]),
        ("", ["mapping", "NoneType"]),
        ("\x00", ["run.yaml"]),
        ("[" * 1000, ["run.yaml"]),
    ],
)
def test_a_faulty_file_is_refused_with_key_and_place(tmp_path, text, parts):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as error:
        load_config(str(path), {})
    for part in [*parts, "run.yaml"]:
        assert part in str(error.value)


def test_bytes_that_are_no_text_are_refused_with_the_file_s_name(tmp_path):
    (tmp_path / "run.yaml").write_bytes(b"model: \xff\xfe\n")
    with pytest.raises(ValueError, match=r"run\.yaml"):
        load_config(str(tmp_path / "run.yaml"), {})


def test_a_faulty_option_is_named_as_an_option(tmp_path):
    (tmp_path / "run.yaml").write_text("lr: 1\n")
    with pytest.raises(ValueError, match=r"^--batch-size: .*'many'"):
        load_config(str(tmp_path / "run.yaml"), {"batch_size": "many"})


@pytest.mark.parametrize("name", ["gemma-2", "missing.yaml", "."])
def test_a_missing_file_is_refused_with_the_profiles_named(name):
    with pytest.raises(FileNotFoundError, match=r"gemma-2-2b, gemma-2-9b"):
        load_config(name, {})


@many_examples
@given(
    lr=st.floats(1e-300, 1e300),
    steps=st.none() | st.integers(1, 10**9),
    keep=st.integers(1, 10**6) | st.just("all"),
    sae=st.lists(names, max_size=3),
    model=st.none() | names,
    ties=st.booleans(),
)
def test_what_is_written_reads_back_the_same(lr, steps, keep, sae, model, ties):
    given = {"lr": lr, "max_steps": steps, "keep_features": keep, "sae": sae, "model": model, "drop_ties": ties}
    config = load_config(None, given)
    assert RunConfig(**yaml.safe_load(to_yaml(config))) == config


def test_a_configuration_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        load_config(None, {}).lr = 1.0


def test_every_field_has_a_description_and_is_an_option_of_a_stage_or_of_the_comparison():
    offered = set().union(*(options_of(name) for name in STAGES))
    fields = {field_of(flag) for flag in offered} - {"config"}
    assert fields.isdisjoint(OF_THE_COMPARISON)
    assert fields | OF_THE_COMPARISON == set(RunConfig.model_fields)
    assert options_of("config", "show") == {f"--{name.replace('_', '-')}" for name in RunConfig.model_fields} | {
        "--config"
    }
    for name, field in RunConfig.model_fields.items():
        assert field.description and field.description.endswith("."), name


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        (
            "precompute",
            "config model dataset split sae out keep-features max-length max-prompt-length token-budget shard-size "
            "dtype limit drop-ties device",
        ),
        (
            "align",
            "config cache model out method reference site epochs max-steps batch-size lr dtype lora-r seed resume "
            "eval-cache",
        ),
        ("sft", "config model dataset split out max-length epochs max-steps batch-size lr dtype seed resume"),
        ("evaluate", "config model cache reference sae site method prompts samples outputs questions seed out"),
        ("train-sae", "config model dataset site width tokens out"),
        ("table", "config runs out jobs ablations dry-run"),
        ("tune", "config runs out jobs"),
    ],
)
def test_the_commands_offer_what_was_promised(command, flags):
    assert options_of(command) >= {f"--{flag}" for flag in flags.split()}


def test_training_an_sae_offers_no_recipe_since_it_has_one():
    assert "--dtype" not in options_of("train-sae")


def written(folder: Path, content: Mapping[str, Any]) -> str:
    (folder / "run.yaml").write_text(write_yaml(dict(content)))
    return str(folder / "run.yaml")


@pytest.mark.parametrize("places", list(product([False, True], repeat=4)))
def test_options_win_over_a_method_s_settings_these_over_a_command_s_and_these_over_the_file(tmp_path, places):
    in_file, in_command, in_method, in_options = places
    content: dict[str, Any] = {"for": {}}
    if in_file:
        content["top-k"] = 1
    if in_command:
        content["for"]["align"] = {"top-k": 2}
    if in_method:
        content["for"]["fpo"] = {"top_k": 3}
    found = load_config(written(tmp_path, content), {"top_k": "4"} if in_options else {}, "align").top_k
    highest = max((number for number, there in enumerate(places, start=1) if there), default=0)
    assert found == (highest or RunConfig().top_k)


def test_every_command_and_method_reads_its_own_settings_and_no_other(tmp_path):
    values = {name: number for number, name in enumerate((*COMMANDS, *METHODS), start=1000)}
    fields = {name: f"x{number}" for name, number in values.items()}
    # One field that all set, and the split as one that only this section sets.
    content = {"top_k": 7, "for": {name: {"top_k": values[name], "split": fields[name]} for name in values}}
    path = written(tmp_path, content)
    for command, method in product([None, *COMMANDS], METHODS):
        config = load_config(path, {"method": method}, command)
        reader = method if command in (None, "align") else command
        assert (config.top_k, config.split) == (values[reader], fields[reader]), (command, method)
    for command, method in product(COMMANDS, METHODS):
        other = {name: part for name, part in content["for"].items() if name not in (command, method)}
        path = written(tmp_path, {"for": other})
        assert load_config(path, {"method": method}, command) == RunConfig(method=method)


@pytest.mark.parametrize(
    ("content", "given", "beta"),
    [
        ({}, {}, 1.0),
        ({"method": "dpo"}, {}, 2.0),
        ({"method": "dpo"}, {"method": "simpo"}, 3.0),
        ({"align": {"method": "simpo"}}, {}, 3.0),
        ({"method": "dpo", "align": {"method": "simpo"}}, {}, 3.0),
        ({"align": {"method": "simpo"}}, {"method": "dpo"}, 2.0),
        ({}, {"method": "tdpo1"}, None),
    ],
)
def test_the_method_that_is_run_chooses_whose_settings_are_read(tmp_path, content, given, beta):
    sections = {"fpo": {"beta": 1.0}, "dpo": {"beta": 2.0}, "simpo": {"beta": 3.0}}
    sections |= {name: content.pop(name) for name in ("align",) if name in content}
    assert load_config(written(tmp_path, content | {"for": sections}), given, "align").beta == beta


def test_a_section_says_whether_a_command_has_settings(tmp_path):
    path = written(tmp_path, {"lr": 1.0, "for": {"sft": {}, "dpo": {"beta": 1.0}}})
    assert {command for command in COMMANDS if has_section(path, command)} == {"sft"}
    assert not has_section(written(tmp_path, {"lr": 1.0}), "sft")


@pytest.mark.parametrize(
    ("sections", "parts"),
    [
        ({"sfr": {"lr": 1.0}}, ["for", "'sfr'", "sft"]),
        ({"train_sae": {"lr": 1.0}}, ["for", "'train_sae'", "train-sae"]),
        ({"ipo": {"lr": 1.0}}, ["for", "'ipo'", "simpo"]),
        ({1: {"lr": 1.0}}, ["for", "'1'", "align"]),
        ({"sft": {"learning-rat": 1.0}}, ["for: sft", "'learning_rat'", "nearest"]),
        ({"dpo": {"bta": 1.0}}, ["for: dpo", "'bta'", "'beta'"]),
        ({"dpo": {"for": {"lr": 1.0}}}, ["for: dpo", "'for'"]),
        ({"dpo": {"method": "fpo"}}, ["for: dpo", "'method'", "leave it out"]),
        ({"sft": None}, ["for: sft", "mapping", "None"]),
        ({"sft": ["lr"]}, ["for: sft", "mapping", "['lr']"]),
        (None, ["for", "None"]),
        (["sft"], ["for", "['sft']"]),
        ({"align": {"lr": "fast"}}, ["lr", "'fast'"]),
        ({"fpo": {"top_k": 0}}, ["top_k", "0"]),
    ],
)
def test_faulty_sections_are_refused_with_key_and_place(tmp_path, sections, parts):
    path = written(tmp_path, {"for": sections})
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as error:
        load_config(path, {}, "align")
    for part in [*parts, "run.yaml"]:
        assert part in str(error.value)


def test_a_key_that_stands_twice_in_a_section_is_refused(tmp_path):
    (tmp_path / "run.yaml").write_text("for: {dpo: {max-length: 1, max_length: 2}}\n")
    with pytest.raises(ValueError, match=r"run\.yaml.*'max_length' stands twice"):
        load_config(str(tmp_path / "run.yaml"), {}, "align")


def test_a_url_stays_one_and_a_folder_too(tmp_path):
    options = {"cache": "s3://bucket/uf", "eval_cache": "hf://datasets/owner/name", "out": "caches//uf"}
    config = load_config(None, options)
    assert (config.cache, config.eval_cache, config.out) == (*list(options.values())[:2], Path("caches/uf"))
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    assert load_config(str(tmp_path / "run.yaml"), {}) == config


def test_what_is_no_place_is_refused():
    with pytest.raises(ValueError, match=r"^--cache: .*found 3"):
        load_config(None, {"cache": 3})
