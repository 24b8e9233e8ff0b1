"""Whole runs of `fpo sft`: what they write, that they can be stopped and repeated, and what they refuse."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml
from fpo.pipeline.commands import inputs
from fpo.pipeline.commands import sft as command
from fpo.pipeline.commands.sft import run_sft
from fpo.pipeline.config import SFTConfig
from fpo.pipeline.config_files import load_config
from fpo.stages.data.chat import GEMMA_TURNS, ChatFormat, Message
from fpo.stages.data.conversations import load_conversations, tokenize_conversation
from fpo.stages.model.models import find_model
from fpo.stages.train.sft import SFTTrainer
from pairs import calm_gemma2, calm_llama
from tiny_tokenizers import chatml, gemma
from tiny_world import WORDS, files, losses, metrics, save_model, state_of, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

# What differs between two runs of the same command, or is a mean since the last start.
CLOCK = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "train_tokens_per_second")
CLOCK += ("train_peak_memory_bytes", "train_peak_process_bytes", "train_loss")


def conversation_rows(seed: int, count: int) -> list[dict[str, Any]]:
    """One or two answers each."""
    rng = random.Random(seed)

    def turn(role: str) -> dict[str, str]:
        return {"role": role, "content": " ".join(rng.choices(WORDS.split(), k=rng.randint(1, 8)))}

    return [
        {"messages": [turn(role) for role in ("user", "assistant") * rng.randint(1, 2)], "prompt_id": str(number)}
        for number in range(count)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Any:
    """A base model, a model with a template, conversations, and a cache of tokenised ones that is the tests' own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("hf"))
        folder = tmp_path_factory.mktemp("sft")
        save_model(folder / "base", calm_gemma2, gemma())
        save_model(folder / "llama", calm_llama, chatml())
        rows = conversation_rows(0, 14)
        rows[4]["messages"] = rows[4]["messages"][:1]
        rows[9]["messages"][1]["content"] = " "
        rows[11]["messages"][0]["content"] *= 9
        write_rows(folder / "chat.jsonl", rows)
        yield folder


@pytest.fixture
def sft(folder) -> Callable[..., Path]:
    """`fpo sft` of the base model: four conversations a step, three steps an epoch."""

    def run(out: Path, **options: Any) -> Path:
        defaults = {"model": str(folder / "base"), "dataset": str(folder / "chat.jsonl"), "split": "train_sft"}
        defaults |= {"max_length": 64, "batch_size": 4, "lr": 1e-3, "warmup_steps": 0, "token_budget": 100}
        given = {"out": out, "logging_steps": 1, **defaults, **options}
        given = {name: value for name, value in given.items() if value is not None}
        config = load_config(SFTConfig, None, given, from_command_line=True)
        config.check_ready()
        run_sft(config)
        return out

    return run


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory) -> Path:
    """Two epochs in one go, with snapshots."""
    out = tmp_path_factory.mktemp("whole") / "run"
    given = {"model": str(folder / "base"), "dataset": str(folder / "chat.jsonl"), "split": "train_sft", "out": out}
    given |= {"max_length": 64, "batch_size": 4, "lr": 1e-3, "warmup_steps": 0, "token_budget": 100}
    given |= {"logging_steps": 1, "epochs": 2, "save_steps": 2, "snapshot_steps": 2}
    run_sft(load_config(SFTConfig, None, given, from_command_line=True))
    return out


def test_the_model_learns(whole):
    found = losses(whole)
    assert len(found) == 6
    assert sum(found[3:]) < sum(found[:3])
    assert "train_tokens_per_second" in metrics(whole)[-1]


def test_the_result_is_a_folder_that_transformers_loads_with_the_template_that_it_was_tuned_in(folder, whole):
    model = AutoModelForCausalLM.from_pretrained(whole)
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert any(not torch.equal(weight, base.get_parameter(name)) for name, weight in model.named_parameters())
    tokenizer = AutoTokenizer.from_pretrained(whole)
    assert tokenizer.chat_template == GEMMA_TURNS
    # A base model's own settings would let it talk on after its turn.
    assert tokenizer.convert_tokens_to_ids("<end_of_turn>") in model.generation_config.eos_token_id
    assert tokenizer.eos_token_id in model.generation_config.eos_token_id
    top = [path.name for path in whole.iterdir() if path.is_file()]
    assert not [name for name in top if name.endswith((".bin", ".pt", ".pth", ".pkl"))]
    assert not list(whole.rglob("training_args.bin"))


def test_the_first_loss_is_that_of_the_base_model_on_the_answers_and_what_was_read_is_said(
    folder, sft, tmp_path, capsys
):
    run = sft(tmp_path / "run", max_steps=1, batch_size=12)
    model, chat = AutoModelForCausalLM.from_pretrained(folder / "base"), ChatFormat(gemma())
    model.set_attn_implementation("eager")
    total, count, tokens = 0.0, 0, 0
    for row in datasets.load_dataset("json", data_files=str(folder / "chat.jsonl"), split="train"):
        turns = tuple(Message(**message) for message in row["messages"])
        kept, _, _ = tokenize_conversation(turns, chat, 64)
        if not kept:
            continue
        (found,) = kept
        ids, learnt = torch.from_numpy(found.ids).long(), torch.from_numpy(found.learnt)
        with torch.no_grad():
            logps = torch.log_softmax(model(input_ids=ids[None]).logits[0, :-1], -1)
        total -= float(logps.gather(1, ids[1:, None]).squeeze(1)[learnt[1:]].double().sum())
        count += int(learnt.sum())
        tokens += ids.numel()
    assert losses(run)[0] == pytest.approx(total / count, rel=1e-5)
    said = capsys.readouterr().out.splitlines()
    assert f"11 conversations, {tokens} tokens, {count} of them learnt; truncated conversations 2" in said
    for reason in ("no assistant turn", "empty response", "no learnt token after truncation"):
        assert f"skipped 1: {reason}" in said


def test_the_record_holds_configuration_inputs_and_versions(folder, whole):
    record = yaml.safe_load((whole / "run.yaml").read_text())
    assert (record["lr"], record["split"], record["snapshot_steps"]) == (1e-3, "train_sft", 2)
    assert record["model_sha256"] == find_model(str(folder / "base")).sha256
    assert len(record["data_sha256"]) == 64
    assert set(record["versions"]) >= {"fpo", "torch", "transformers", "tokenizers"}
    assert all(record["versions"].values())


def test_a_template_of_one_s_own_is_used_and_saved(folder, sft, tmp_path):
    own = tmp_path / "own.jinja"
    own.write_text(chatml().chat_template.replace("<|im_end|>", "<|im_end|><|endoftext|>"))
    run = sft(tmp_path / "run", max_steps=1, model=str(folder / "llama"), chat_template=str(own))
    assert AutoTokenizer.from_pretrained(run).chat_template == own.read_text()
    told = yaml.safe_load((run / "run.yaml").read_text())["data_sha256"]
    for template, same in ((own.read_text(), True), (None, False)):
        chat = ChatFormat(chatml(), template)
        data = load_conversations(str(folder / "chat.jsonl"), split="train_sft", chat=chat, max_length=64)
        assert (data.sha256 == told) == same


# Snapshots and resuming.


def test_a_snapshot_is_what_a_run_of_that_many_steps_ends_with_and_a_longer_run_goes_on(sft, whole, tmp_path):
    assert sorted(path.name for path in (whole / "snapshots").iterdir()) == ["step-000002", "step-000004"]
    for resume, steps in ((False, 2), (True, 4)):
        run = sft(tmp_path / "run", max_steps=steps, snapshot_steps=2, resume=resume)
        snapshot = whole / "snapshots" / f"step-{steps:06d}"
        assert (snapshot / "model.safetensors").read_bytes() == (run / "model.safetensors").read_bytes()
        assert AutoTokenizer.from_pretrained(snapshot).chat_template == GEMMA_TURNS
        AutoModelForCausalLM.from_pretrained(snapshot)
        assert (run / "snapshots").exists() == resume
    assert [path.name for path in (run / "snapshots").iterdir()] == ["step-000002"]


def test_a_run_stopped_and_resumed_ends_where_one_in_one_go_ends(sft, whole, tmp_path, monkeypatch):
    options = {"epochs": 2, "save_steps": 3, "snapshot_steps": 2}
    broken, late = tmp_path / "broken", "snapshots/step-000004/model.safetensors"
    real = SFTTrainer.row_loss

    def row_loss(self: SFTTrainer, *args: Any) -> Any:
        if self.state.global_step == 5:
            raise KeyboardInterrupt
        return real(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(SFTTrainer, "row_loss", row_loss)
        with pytest.raises(KeyboardInterrupt):
            sft(broken, **options)
    assert not (broken / "model.safetensors").exists()
    (broken / late).write_bytes(b"of a step that is made again")
    sft(broken, resume=True, **options)
    for name in ("model.safetensors", "snapshots/step-000002/model.safetensors", late):
        assert (broken / name).read_bytes() == (whole / name).read_bytes()
    expected, found = (
        [{key: value for key, value in line.items() if key not in CLOCK} for line in metrics(run)]
        for run in (whole, broken)
    )
    assert found == expected


@pytest.mark.parametrize("options", [{"max_steps": 4, "snapshot_steps": 2}, {"epochs": 1.5}])
def test_a_finished_run_that_is_resumed_says_so_and_touches_nothing(sft, tmp_path, monkeypatch, capsys, options):
    run = sft(tmp_path / "run", **options)
    before, steps = state_of(run), len(losses(run))
    monkeypatch.setattr(inputs, "load_model", lambda *_, **__: pytest.fail("loads a model"))
    capsys.readouterr()
    sft(run, resume=True, **options)
    said = capsys.readouterr().out.replace("\n", " ")
    assert f"{run}: finished after {steps} steps; nothing was left to do" in said
    assert state_of(run) == before


def test_resuming_with_other_data_or_other_settings_is_refused(sft, tmp_path):
    dataset = write_rows(tmp_path / "chat.jsonl", conversation_rows(1, 5))
    run = sft(tmp_path / "run", dataset=str(dataset), max_steps=1)
    before = files(run)
    with pytest.raises(ValueError, match=r"\A--resume: [^\n]*lr: was 0.001, is 0.01\Z"):
        sft(run, dataset=str(dataset), max_steps=1, lr=1e-2, resume=True)
    write_rows(dataset, conversation_rows(2, 5))
    with pytest.raises(ValueError, match=r"\A--resume: [^\n]*data_sha256: was [^\n]*\Z"):
        sft(run, dataset=str(dataset), max_steps=1, resume=True)
    assert files(run) == before


# What is refused.

Change = Callable[[Path], dict[str, Any]]

REFUSED: dict[str, tuple[Change, str]] = {
    "no model": (lambda f: {"model": None}, "--model: expected a value"),
    "no data set": (lambda f: {"dataset": None}, "--dataset: expected a value"),
    "missing model": (lambda f: {"model": str(f / "none")}, "none"),
    "missing data": (
        lambda f: {"dataset": str(f / "none.jsonl")},
        "--dataset: expected a file or .*none.jsonl",
    ),
    "missing template": (lambda f: {"chat_template": str(f / "none.jinja")}, "none.jinja"),
    "preference data": (lambda f: {"dataset": str(f / "pairs.jsonl")}, "'chosen', 'rejected', expected 'messages'"),
    "malformed row": (lambda f: {"dataset": str(f / "bad.jsonl")}, "row 1 of split 'train_sft': expected messages"),
    "no answers": (lambda f: {"dataset": str(f / "asked.jsonl")}, "found none in .*; skipped 2: no assistant turn"),
    "length": (lambda f: {"max_length": 3}, "found none in .*: no learnt token after truncation"),
    "limit": (lambda f: {"limit": 0}, "--limit: .* found 0"),
    "batch size": (lambda f: {"batch_size": 7, "accumulation": 2}, "--batch-size: expected a multiple"),
    "schedule": (lambda f: {"lr_scheduler": "sometimes"}, "sometimes"),
    "warm-up": (lambda f: {"lr_scheduler": "constant"}, "--warmup-steps: .* ignores it"),
    "epochs beside max steps": (lambda f: {"epochs": 2, "max_steps": 1}, "--epochs: --max-steps alone"),
    "tracker": (lambda f: {"report_to": "paper"}, "paper is not supported"),
    "device": (lambda f: {"device": "gpu"}, "--device: expected a device of this machine, found 'cuda'"),
    "snapshots": (lambda f: {"snapshot_steps": 0}, "--snapshot-steps: .* found 0"),
    "nothing to resume": (lambda f: {"resume": True}, "--resume: expected a run in .*, found no run.yaml"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_mistake_is_one_line_and_leaves_nothing(folder, sft, tmp_path, case):
    change, message = REFUSED[case]
    write_rows(tmp_path / "pairs.jsonl", [{"chosen": "a", "rejected": "b"}])
    asked = [{"messages": row["messages"][:1]} for row in conversation_rows(3, 2)]
    write_rows(tmp_path / "asked.jsonl", asked)
    write_rows(tmp_path / "bad.jsonl", [asked[0], {"messages": [{"role": "user", "content": 3}]}])
    with pytest.raises((ValueError, OSError), match=rf"\A[^\n]*{message}[^\n]*\Z"):
        sft(tmp_path / "out", **change(tmp_path))
    assert not (tmp_path / "out").exists()


def test_a_folder_with_files_is_refused_before_anything_is_loaded(sft, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "load_conversations", lambda *_, **__: pytest.fail("tokenises"))
    monkeypatch.setattr(inputs, "load_model", lambda *_, **__: pytest.fail("loads a model"))
    (tmp_path / "note.txt").write_text("mine")
    for out in (tmp_path, tmp_path / "note.txt"):
        with pytest.raises(ValueError, match=r"\A--out: expected a new or empty folder, found [^\n]*\Z"):
            sft(out)
    assert files(tmp_path) == {"note.txt": b"mine"}
