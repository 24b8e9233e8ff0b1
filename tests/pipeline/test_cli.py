import os
import signal
import subprocess
import sys

import pytest
import yaml
from fpo.cache.reader import open_cache, verify
from fpo.pipeline.cli import app
from fpo.pipeline.commands import precompute as run_precompute
from fpo.pipeline.commands import train_sae as run_train_sae
from fpo.pipeline.config import AlignConfig
from fpo.pipeline.config_files import COMMANDS, load_config
from fpo.pipeline.errors import user_errors
from fpo.stages.model.sae import load_sae
from tiny_world import SITES, files, fpo, ran, rows, to_arguments, write_rows
from typer.testing import CliRunner

HEAVY = ("torch", "transformers", "sae_lens", "datasets", "pyarrow", "peft")


def test_help_and_configuration_come_without_the_heavy_libraries():
    program = (
        "import sys; from typer.testing import CliRunner; from fpo.pipeline.cli import app\n"
        "for arguments in (['--help'], ['align', '--help'], ['config', 'show', 'align', '--config', 'gemma-2-2b']):\n"
        "    result = CliRunner().invoke(app, arguments); assert result.exit_code == 0, result.output\n"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "command",
    [
        *("precompute", "align", "train-sae", "sft", "evaluate", "table", "tune"),
        *("merge", "cache info", "cache verify", "config show align"),
    ],
)
def test_every_command_explains_itself(command):
    result = ran(fpo(*command.split(), "--help"))
    assert f"{command} [OPTIONS]" in result.stdout


def test_the_resolved_configuration_is_shown_and_can_be_read_back(tmp_path):
    options = ["--config", "smollm2-135m", "--lr", "1e-3", "--sae", "a", "--sae", "b"]
    result = ran(fpo("config", "show", "align", *options))
    path = tmp_path / "run.yaml"
    path.write_text(result.stdout)
    shown = load_config(AlignConfig, str(path), {})
    assert shown == load_config(AlignConfig, "smollm2-135m", {"lr": 1e-3, "sae": ("a", "b")})
    assert (shown.lr, shown.sae) == (1e-3, ("a", "b"))


def test_without_a_command_the_configuration_of_all_is_shown(tmp_path):
    path = tmp_path / "all.yaml"
    path.write_text(ran(fpo("config", "show", "--config", "embedded")).stdout)
    for command in COMMANDS.values():
        assert load_config(command, str(path), {}) == load_config(command, "embedded", {})


def test_flags_can_be_switched_off_again(tmp_path):
    (tmp_path / "run.yaml").write_text("drop_ties: true\n")
    arguments = ["config", "show", "precompute", "--config", tmp_path / "run.yaml"]
    assert yaml.safe_load(ran(fpo(*arguments)).stdout)["drop_ties"] is True
    assert yaml.safe_load(ran(fpo(*arguments, "--no-drop-ties")).stdout)["drop_ties"] is False


def test_precompute_says_what_it_did_and_writes_its_configuration(world, tmp_path):
    result = ran(world.precompute(tmp_path / "[out]"))
    assert f"{tmp_path}/[out]: 12 pairs in 4 shards" in result.stdout
    for line in ("ties 1", "skipped 1: empty response", "skipped 1: identical responses", "noise between two packings"):
        assert line in result.stdout
    record = yaml.safe_load((tmp_path / "[out]" / "run.yaml").read_text())
    assert (record["token_budget"], record["sae"]) == (160, [str(sae) for sae in world.saes])


def test_info_says_what_is_in_a_cache(world):
    result = ran(fpo("cache", "info", world.cache))
    found = {line.split(maxsplit=1)[0]: line for line in result.stdout.splitlines() if line.strip()}
    assert "12 in 4 shards of 4 raw rows" in found["pairs"]
    assert found["fingerprint"].split() == ["fingerprint", open_cache(world.cache).manifest.meaning.fingerprint()]
    assert "empty response 1, identical responses 1" in found["skipped"]
    assert "1 (kept)" in found["ties"]
    assert str(world.gemma) in found["provenance"]
    for site in SITES:
        assert f"{site.name}: jumprelu SAE, width 64" in result.stdout
    assert "100.0% of them kept; 0 of 24 responses were cut" in result.stdout


def test_verify_names_every_damaged_shard_and_nothing_else(world, tmp_path):
    out = tmp_path / "out"
    ran(world.precompute(out))
    assert ran(fpo("cache", "verify", out)).stdout == "sound\n"
    shards = sorted((out / "data").iterdir())
    data = bytearray(shards[1].read_bytes())
    data[len(data) // 3] ^= 1
    shards[1].write_bytes(bytes(data))
    shards[2].unlink()
    result = fpo("cache", "verify", out)
    assert result.exit_code == 1
    damaged = [line.split(":")[0] for line in result.stdout.splitlines()]
    assert damaged == [f"data/{shard.name}" for shard in shards[1:3]]
    shards[1].unlink()
    shards[0].rename(shards[2])  # another shard's rows
    ran(world.precompute(out))
    assert verify(out) == []


def test_verify_of_no_cache_says_so(tmp_path):
    result = fpo("cache", "verify", tmp_path)
    assert (result.exit_code, "manifest.json" in result.stdout) == (1, True)


def test_an_sae_is_trained_that_a_cache_can_be_made_with(world, tmp_path):
    data = write_rows(tmp_path / "data.jsonl", rows(5, 40))
    options = {"model": world.gemma, "dataset": data, "site": SITES[0].name, "width": 96, "tokens": 600}
    options |= {"max_length": 64, "max_prompt_length": 32}
    result = ran(fpo("train-sae", *to_arguments(options), "--out", tmp_path / "sae"))
    assert "explained variance" in result.stdout
    sae = load_sae(str(tmp_path / "sae"))
    assert (sae.site, sae.width, sae.sae.cfg.d_in) == (SITES[0], 96, 32)
    assert yaml.safe_load((tmp_path / "sae" / "run.yaml").read_text())["tokens"] == 600
    ran(world.precompute(tmp_path / "cache", sae=tmp_path / "sae"))
    before = files(tmp_path / "sae")
    again = fpo("train-sae", *to_arguments(options), "--out", tmp_path / "sae")
    assert (again.exit_code, "already holds an SAE" in again.stderr) == (2, True)
    assert files(tmp_path / "sae") == before


def test_a_second_sae_into_the_same_folder_is_refused_while_the_first_is_trained(world, tmp_path, monkeypatch):
    data = write_rows(tmp_path / "data.jsonl", rows(5, 40))
    options = {"model": world.gemma, "dataset": data, "site": SITES[0].name, "width": 96, "tokens": 600}
    arguments = ["train-sae", *to_arguments(options | {"max_length": 64, "max_prompt_length": 32})]
    real, second = run_train_sae.train_sae, []

    def train(*args: object, **kwargs: object) -> object:
        if not second:
            second.append(fpo(*arguments, "--seed", 1, "--out", tmp_path / "sae"))
        return real(*args, **kwargs)

    monkeypatch.setattr(run_train_sae, "train_sae", train)
    ran(fpo(*arguments, "--out", tmp_path / "sae"))
    assert (second[0].exit_code, "--out: another run is writing into" in second[0].stderr) == (2, True)
    assert yaml.safe_load((tmp_path / "sae" / "run.yaml").read_text())["seed"] == 0
    load_sae(str(tmp_path / "sae"))


def test_a_fault_of_ours_is_a_traceback(monkeypatch):
    def fail(config: object) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(run_precompute, "run_precompute", fail)
    with pytest.raises(KeyError, match="a bug"):
        fpo("precompute", "--model", "m", "--dataset", "d", "--sae", "s", "--out", "o")


def test_a_user_s_mistake_can_be_shown_as_a_traceback(monkeypatch):
    monkeypatch.setenv("FPO_TRACEBACK", "1")
    with pytest.raises(ValueError, match="--model"):
        fpo("precompute")


SLOW_STARTS = {
    "a misspelt option": ["align", "--metod", "fpo"],
    "a wrong value": ["align", "--method", "ipo"],
    "nothing": ["align"],
    "a missing file": ["sft", "--model", "m", "--dataset", "none.jsonl", "--out", "o"],
    "a missing cache": ["align", "--model", "m", "--cache", "none", "--sae", "s", "--out", "o"],
}


@pytest.mark.parametrize("what", SLOW_STARTS)
def test_a_mistake_in_the_options_is_answered_before_the_heavy_libraries_are_imported(what):
    program = (
        "import sys; from typer.testing import CliRunner; from fpo.pipeline.cli import app\n"
        f"result = CliRunner().invoke(app, {SLOW_STARTS[what]}); assert result.exit_code == 2, result.output\n"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_an_unknown_option_is_answered_with_the_nearest():
    result = CliRunner().invoke(app, ["align", "--learning-rate", "1"])
    assert result.exit_code == 2
    assert result.stderr == "fpo: --learning-rate: `root align` has no such option; the nearest is --lr\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_a_command_and_the_handler_is_put_back(capsys, number):
    before = signal.getsignal(number)
    with pytest.raises(Exception) as raised, user_errors():
        os.kill(os.getpid(), number)
    assert raised.value.exit_code == 130
    assert "fpo: stopped" in capsys.readouterr().err
    assert signal.getsignal(number) is before


def test_a_signal_stops_a_command_whatever_it_raises_where_it_comes(capsys):
    with pytest.raises(Exception) as raised, user_errors():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except KeyboardInterrupt:
            raise ImportError("cannot import name io") from None
    assert (raised.value.exit_code, capsys.readouterr().err) == (130, "fpo: stopped; nothing was written\n")


def test_a_signal_that_the_caller_ignores_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with user_errors():
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
