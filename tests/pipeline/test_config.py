from typing import Any

import pytest
import typer
import yaml
from fpo.pipeline.cli import app
from fpo.pipeline.config import RunConfig, load_config, profile_names, to_yaml
from hypothesis import given
from hypothesis import strategies as st
from pairs import many_examples

# PyYAML does not read back every control character and line separator that it writes.
names = st.text(st.characters(exclude_categories=["C", "Zl", "Zp"]))
PROFILES = ["gemma-2-2b", "gemma-2-9b", "gemma-3-270m", "smollm2-135m"]


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
    assert config.dataset == "HuggingFaceH4/ultrafeedback_binarized"
    assert len(config.sae) == len(config.site) > 0


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
        ("a: &a [*a]\n", ["'a'"]),
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


def test_every_field_has_a_description_and_is_an_option_of_a_stage():
    offered = set().union(*(options_of(name) for name in ("precompute", "align", "train-sae")))
    assert {field_of(flag) for flag in offered} - {"config"} == set(RunConfig.model_fields)
    assert options_of("config", "show") >= offered
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
        ("train-sae", "config model dataset site width tokens out"),
    ],
)
def test_the_commands_offer_what_was_promised(command, flags):
    assert options_of(command) >= {f"--{flag}" for flag in flags.split()}


def test_training_an_sae_offers_no_recipe_since_it_has_one():
    assert "--dtype" not in options_of("train-sae")
