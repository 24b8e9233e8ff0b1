from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from fpo.cache.errors import UserError
from fpo.pipeline.cli import app
from fpo.pipeline.config import AlignConfig, EvaluateConfig, PrecomputeConfig, SFTConfig, TrainSAEConfig
from fpo.pipeline.config_files import (
    COMMANDS,
    RECORD_KEYS,
    has_section,
    load_config,
    profile_names,
    to_yaml,
    write_yaml,
)
from fpo.pipeline.report_config import TableConfig
from hypothesis import given
from hypothesis import strategies as st
from pairs import many_examples

# PyYAML does not read back every control character and line separator that it writes.
names = st.text(st.characters(exclude_categories=["C", "Zl", "Zp"]))
PROFILES = ["embedded", "gemma-2-2b", "gemma-2-9b", "gemma-3-1b-it", "gemma-3-270m", "gemma-3-270m-it", "smollm2-135m"]


def options_of(*names: str) -> set[str]:
    """The flags of a command."""
    command: Any = typer.main.get_command(app)
    for name in names:
        command = command.commands[name]
    return {parameter.opts[0] for parameter in command.params}


@pytest.mark.parametrize("name", PROFILES)
def test_every_profile_loads(name):
    config = load_config(PrecomputeConfig, name, {})
    assert config.dataset == ("embedded:data" if name == "embedded" else "HuggingFaceH4/ultrafeedback_binarized")
    align = load_config(AlignConfig, name, {})
    assert len(config.sae) == len(align.sae) == len(align.site) == 1
    for command, config_class in COMMANDS.items():
        loaded = load_config(config_class, name, {})
        assert command == "judge" or loaded.model  # a judge has an endpoint


def test_the_profiles_are_those_that_the_help_names():
    assert profile_names() == sorted(PROFILES)


def test_the_paper_s_settings_are_those_of_its_table_5():
    config = load_config(AlignConfig, "gemma-2-2b", {})
    assert (config.batch_size, config.lr, config.warmup_steps, config.epochs) == (32, 5e-7, 150, 1.0)
    assert (config.lr_scheduler, config.optimizer) == ("constant_with_warmup", "adam")
    assert (config.top_k, config.site) == (50, ("blocks.25.hook_resid_post",))
    assert load_config(AlignConfig, "gemma-2-9b", {}).optimizer == "rmsprop"


def test_an_option_wins_over_the_file(tmp_path):
    (tmp_path / "run.yaml").write_text("lr: 1.0e-3\nbatch-size: 8\n")
    config = load_config(AlignConfig, str(tmp_path / "run.yaml"), {"lr": "2e-5"})
    assert (config.lr, config.batch_size) == (2e-5, 8)
    assert load_config(AlignConfig, str(tmp_path / "run.yaml"), {}).lr == 1e-3


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
        ("top_k: most\n", ["top_k", "'most'"]),
        ("for: {sft: {lr: 1}}\n", ["'for'", "'methods'"]),
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
        load_config(AlignConfig, str(path), {})
    for part in [*parts, "run.yaml"]:
        assert part in str(error.value)


def test_bytes_that_are_no_text_are_refused_with_the_file_s_name(tmp_path):
    (tmp_path / "run.yaml").write_bytes(b"model: \xff\xfe\n")
    with pytest.raises(UserError, match=r"run\.yaml"):
        load_config(AlignConfig, str(tmp_path / "run.yaml"), {})


def test_a_faulty_option_is_named_as_an_option(tmp_path):
    (tmp_path / "run.yaml").write_text("lr: 1\n")
    with pytest.raises(ValueError, match=r"^--batch-size: .*'many'"):
        load_config(AlignConfig, str(tmp_path / "run.yaml"), {"batch_size": "many"})


@pytest.mark.parametrize("name", ["gemma-2", "missing.yaml", "."])
def test_a_missing_file_is_refused_with_the_profiles_named(name):
    with pytest.raises(UserError, match=r"gemma-2-2b, gemma-2-9b"):
        load_config(AlignConfig, name, {})


@many_examples
@given(
    limit=st.none() | st.integers(1, 10**9),
    keep=st.integers(1, 10**6) | st.just("all"),
    sae=st.lists(names, max_size=3),
    model=names,
    ties=st.booleans(),
)
def test_what_is_written_reads_back_the_same(limit, keep, sae, model, ties):
    given = {"limit": limit, "keep_features": keep, "sae": sae, "model": model, "drop_ties": ties}
    config = load_config(PrecomputeConfig, None, given)
    assert PrecomputeConfig(**yaml.safe_load(to_yaml(config))) == config


def test_a_configuration_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        load_config(AlignConfig, None, {}).lr = 1.0


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_s_options_are_its_fields_and_each_explains_itself(command):
    fields = COMMANDS[command].model_fields
    in_file = {name for name, field in fields.items() if field.json_schema_extra == {"in_file": True}}
    assert options_of(command) == {f"--{name.replace('_', '-')}" for name in {"config", *fields} - in_file}
    assert options_of("config", "show", command) == options_of(command)
    assert not in_file or command in ("table", "tune")
    for name, field in fields.items():
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
    content: dict[str, Any] = {}
    if in_file:
        content["top-k"] = 1
    if in_command:
        content["align"] = {"top-k": 2}
    if in_method:
        content["methods"] = {"fpo": {"top_k": 3}}
    path = written(tmp_path, content | {"lr": 1.0})
    found = load_config(AlignConfig, path, {"top_k": "4"} if in_options else {}).top_k
    highest = max((number for number, there in enumerate(places, start=1) if there), default=0)
    assert found == (highest or 50)


def test_every_command_reads_its_own_section_and_what_all_share(tmp_path):
    reading = {name: config for name, config in COMMANDS.items() if "model" in config.model_fields}
    assert COMMANDS.keys() - reading == {"judge"}
    sections = {name: {"model": name} for name in reading}
    path = written(tmp_path, {"model": "shared", "top_k": 7, "drop_ties": True, **sections})
    for name, command in reading.items():
        config = load_config(command, path, {})
        assert config.model == name
        assert getattr(config, "top_k", 7) == 7 and getattr(config, "drop_ties", True)
    path = written(tmp_path, {"lr": 1.0, "align": {"model": "policy"}})
    assert load_config(AlignConfig, path, {}).model == "policy" and load_config(SFTConfig, path, {}).model is None


def test_judge_is_a_command_s_section_and_an_option(tmp_path):
    found = load_config(COMMANDS["judge"], written(tmp_path, {"judge": {"judge": "a-model", "seed": 3}}), {})
    assert (found.judge, found.seed) == ("a-model", 3)
    found = load_config(COMMANDS["judge"], written(tmp_path, {"judge": "a-model"}), {})
    assert found.judge == "a-model"


@pytest.mark.parametrize(
    ("content", "given", "beta"),
    [
        ({}, {}, 1.0),
        ({"method": "dpo"}, {}, 2.0),
        ({"method": "dpo"}, {"method": "simpo"}, 3.0),
        ({"method": "dpo"}, {"method": "SimPO"}, 3.0),
        ({"align": {"method": "simpo"}}, {}, 3.0),
        ({"method": "dpo", "align": {"method": "simpo"}}, {}, 3.0),
        ({"align": {"method": "simpo"}}, {"method": "dpo"}, 2.0),
        ({}, {"method": "tdpo1"}, None),
    ],
)
def test_the_method_that_is_run_chooses_whose_settings_are_read(tmp_path, content, given, beta):
    methods = {"fpo": {"beta": 1.0}, "dpo": {"beta": 2.0}, "simpo": {"beta": 3.0}}
    assert load_config(AlignConfig, written(tmp_path, content | {"methods": methods}), given).beta == beta


def test_a_section_says_whether_a_command_has_settings(tmp_path):
    path = written(tmp_path, {"lr": 1.0, "sft": {}, "methods": {"dpo": {"beta": 1.0}}})
    assert {name for name, command in COMMANDS.items() if has_section(path, command)} == {"sft"}
    assert not has_section(written(tmp_path, {"lr": 1.0}), SFTConfig)


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ({"sfr": {"lr": 1.0}}, ["'sfr'", "'sft'"]),
        ({"sft": {"learning-rate": 1.0}}, ["sft", "'learning_rate'", "'lr'"]),
        ({"sft": {"method": "dpo"}}, ["sft", "'method'", "nearest"]),
        ({"sft": None}, ["sft", "mapping", "None"]),
        ({"sft": ["lr"]}, ["sft", "mapping", "['lr']"]),
        ({"align": {"lr": "fast"}}, ["lr", "'fast'"]),
        ({"methods": {"ipo": {"lr": 1.0}}}, ["methods", "'ipo'", "simpo"]),
        ({"methods": {1: {"lr": 1.0}}}, ["methods", "'1'"]),
        ({"methods": {"dpo": {"bta": 1.0}}}, ["methods: dpo", "'bta'", "'beta'"]),
        ({"methods": {"dpo": {"method": "fpo"}}}, ["methods: dpo", "'method'", "leave it out"]),
        ({"methods": None}, ["methods", "None"]),
        ({"methods": ["dpo"]}, ["methods", "['dpo']"]),
        ({"methods": {"fpo": {"top_k": 0}}}, ["top_k", "0"]),
    ],
)
def test_faulty_sections_are_refused_with_key_and_place(tmp_path, content, parts):
    path = written(tmp_path, content)
    with pytest.raises(UserError, match=r"\A[^\n]+\Z") as error:
        load_config(AlignConfig, path, {})
    for part in [*parts, "run.yaml"]:
        assert part in str(error.value)


def test_a_key_that_stands_twice_in_a_section_is_refused(tmp_path):
    (tmp_path / "run.yaml").write_text("methods: {dpo: {max-length: 1, max_length: 2}}\n")
    with pytest.raises(UserError, match=r"run\.yaml.*'max_length' stands twice"):
        load_config(AlignConfig, str(tmp_path / "run.yaml"), {})


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("method", "DPO", "dpo"),
        ("method", "TDPO-1", "tdpo1"),
        ("method", "SimPO+KL", "simpo-kl"),
        ("optimizer", "adamw", "adam"),
        ("optimizer", "RMSprop", "rmsprop"),
        ("dtype", "BF16", "bf16"),
        ("dtype", "bfloat16", "bf16"),
        ("dtype", "float32", "fp32"),
        ("attention", "flex_attention", "packed_flex"),
        ("device", "CPU", "cpu"),
    ],
)
def test_choices_are_understood_in_any_case_and_by_their_other_names(name, given, expected):
    assert getattr(load_config(AlignConfig, None, {name: given}), name) == expected


@pytest.mark.parametrize(
    ("name", "given", "near"),
    [("method", "tdpo3", "tdpo"), ("optimizer", "rmsprob", "'rmsprop'"), ("dtype", "fp16", "'bf16'|'fp32'")],
)
def test_a_choice_that_is_none_is_answered_with_the_nearest(name, given, near):
    with pytest.raises(UserError, match=rf"\A--{name}: [^\n]*the nearest is [^\n]*({near})[^\n]*'{given}'\Z"):
        load_config(AlignConfig, None, {name: given})


def test_all_missing_options_are_named_at_once():
    for command, missing in (
        (PrecomputeConfig, "--model, --dataset, --sae, --out"),
        (AlignConfig, "--model, --cache, --out, --sae"),
        (SFTConfig, "--model, --dataset, --out"),
        (TrainSAEConfig, "--model, --dataset, --site, --out"),
        (EvaluateConfig, "--model, --out"),
    ):
        with pytest.raises(UserError, match=rf"\A{missing}: expected a value for each, found none"):
            load_config(command, None, {}).check_ready()
    with pytest.raises(UserError, match=r"\A--model, --cache, --out, --reference: "):
        load_config(AlignConfig, None, {"method": "tdpo1"}).check_ready()
    load_config(TableConfig, None, {}).check_ready()


def test_options_that_would_be_ignored_are_refused_on_the_command_line_and_allowed_in_a_file(tmp_path):
    path = written(tmp_path, {"method": "dpo", "top_k": 9})
    load_config(AlignConfig, path, {}, from_command_line=True)
    with pytest.raises(UserError, match=r"\A--top-k: [^\n]*dpo[^\n]*leave it out\Z"):
        load_config(AlignConfig, path, {"top_k": 9}, from_command_line=True)


def test_what_a_record_says_beside_the_configuration_is_ignored(tmp_path):
    config = load_config(AlignConfig, None, {"model": "a", "cache": "b", "out": "c", "lr": 1e-3})
    record = dict.fromkeys(RECORD_KEYS, "of the run") | {"finished": {"step": 3, "epoch": 1.0}}
    (tmp_path / "run.yaml").write_text(to_yaml(config, record))
    assert load_config(AlignConfig, str(tmp_path / "run.yaml"), {}) == config


def test_a_url_stays_one_and_a_folder_too(tmp_path):
    options = {"cache": "s3://bucket/uf", "eval_cache": "hf://datasets/owner/name", "out": "caches//uf"}
    config = load_config(AlignConfig, None, options)
    assert (config.cache, config.eval_cache, config.out) == (*list(options.values())[:2], Path("caches/uf"))
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    assert load_config(AlignConfig, str(tmp_path / "run.yaml"), {}) == config


def test_only_stage_one_writes_into_a_store():
    assert load_config(PrecomputeConfig, None, {"out": "s3://bucket/uf"}).out == "s3://bucket/uf"
    for name, command in COMMANDS.items():
        if name != "precompute":
            with pytest.raises(UserError, match=r"\A--out: expected a folder; .*found 's3://bucket/run'\Z"):
                load_config(command, None, {"out": "s3://bucket/run"})


def test_what_is_no_place_is_refused():
    with pytest.raises(UserError, match=r"^--cache: .*found 3"):
        load_config(AlignConfig, None, {"cache": 3})
