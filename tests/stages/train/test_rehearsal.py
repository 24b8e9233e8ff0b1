"""What would fail at the end of a run fails before its first step, or is put right; what is right is left alone."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fpo.stages.train.align import FPOTrainer
from fpo.stages.train.config import FPOConfig
from fpo.stages.train.rehearsal import _bytes_to_come, outside_decoder
from safetensors import safe_open
from tiny_tokenizers import gemma
from tiny_world import World, files, fpo, ran, save_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    TrainerCallback,
)

NOTHING: dict[str, bytes] = {}


@pytest.fixture
def model(world, tmp_path) -> Path:
    """A copy of the world's model, for its settings to be changed; its weights, and so its cache, are the world's."""
    return shutil.copytree(world.gemma, tmp_path / "model")


def align(world: World, out: Path, model: Path, *changes: str, **options: Any) -> Any:
    return world.align(out, *changes, method="dpo", model=model, **{"max_steps": 1, **options})


def refused(result: Any, *parts: str) -> None:
    said = [line for line in result.stderr.splitlines() if line.startswith("fpo: ")]
    assert (result.exit_code, len(said)) == (2, 1), result.stderr
    for part in parts:
        assert part in said[0]


# As models are published: settings, what is said of them, and what is saved.
SETTINGS: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "sampling that is not asked for": (
        {"temperature": 0.6, "top_p": 0.9},
        "do_sample is set to true",
        {"do_sample": True, "temperature": 0.6, "top_p": 0.9},
    ),
    "sampling that is refused": ({"do_sample": False, "top_k": 20}, "top_k are left out", {"do_sample": False}),
    "min_p": ({"min_p": 0.05}, "do_sample is set to true", {"do_sample": True, "min_p": 0.05}),
    "beams of none": ({"length_penalty": 0.8}, "length_penalty are left out", {}),
    "padding by no token": ({"pad_token_id": -1}, "pad_token_id is left out", {}),
    "nothing wrong": ({"do_sample": True, "temperature": 0.6}, "", {"do_sample": True, "temperature": 0.6}),
    "nothing at all": ({}, "", {}),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_of_generation_that_are_published_are_put_right_and_saved(world, model, tmp_path, caplog, case):
    settings, said, saved = SETTINGS[case]
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": 1, **settings}))
    ran(align(world, tmp_path / "out", model))
    notes = [record.message for record in caplog.records if record.name == "fpo"]
    assert len(notes) == bool(said) and all(said in note for note in notes)
    found = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    kept = {key: value for key, value in found.items() if key in ("do_sample", *settings) and value is not None}
    assert kept == saved
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("settings", [{"num_return_sequences": 4}, {"cache_implementation": "wishful"}])
def test_settings_that_nobody_can_put_right_are_refused_before_the_first_step(world, model, tmp_path, settings):
    (model / "generation_config.json").write_text(json.dumps({"temperature": 0.6, **settings}))
    refused(align(world, tmp_path / "out", model), next(iter(settings)))
    assert files(tmp_path / "out") == NOTHING


def trainer(world: World, out: Path, policy: Any, tokenizer: Any = None, **settings: Any) -> FPOTrainer:
    defaults: dict[str, Any] = {"use_cpu": True, "report_to": "none", "max_steps": 2, "save_steps": 1, "method": "dpo"}
    defaults |= {"save_total_limit": 2, "per_device_train_batch_size": 2, "disable_tqdm": True}
    args = FPOConfig(output_dir=str(out), **(defaults | settings))
    return FPOTrainer(policy, args, world.open(()), processing_class=tokenizer)


class Unsaved:
    """Stands before a tokenizer, which it does not save as it is."""

    def __init__(self, inner: Any, save: Callable[[Any, Path], None]) -> None:
        self._inner, self._save = inner, save

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def save_pretrained(self, folder: Path) -> None:
        self._save(self._inner, folder)


def without_template(tokenizer: Any, folder: Path) -> None:
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").unlink()


def not_at_all(tokenizer: Any, folder: Path) -> None:
    raise TypeError("cannot pickle 'Tokenizer' object")


def no_files(tokenizer: Any, folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text("{}")


@pytest.mark.parametrize("save", [without_template, not_at_all, no_files])
def test_a_tokenizer_that_cannot_be_read_back_stops_the_run(world, tmp_path, save):
    tokenizer = AutoTokenizer.from_pretrained(world.gemma)
    tokenizer.chat_template = world.open(()).manifest.meaning.chat_template
    with pytest.raises(ValueError, match=r"\Amodel: transformers cannot save it and read it back: [^\n]+\Z"):
        trainer(world, tmp_path / "out", world.policy(), Unsaved(tokenizer, save)).train()
    assert files(tmp_path / "out") == NOTHING


def unserialisable(policy: Any) -> None:
    policy.config.extra = object()


def sharing(policy: Any) -> None:
    layers = policy.model.layers
    layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight


def quantised(policy: Any) -> None:
    policy.hf_quantizer = type(
        "Quantizer", (), {"quantization_config": type("Config", (), {"quant_method": "gguf"})()}
    )()


@pytest.mark.parametrize("spoil", [unserialisable, sharing, quantised])
def test_a_model_that_cannot_be_saved_stops_the_run(world, tmp_path, spoil):
    policy = world.policy()
    run = trainer(world, tmp_path / "out", policy, allow_different_start=True)
    spoil(policy)
    with pytest.raises(ValueError, match=r"\A[^\n]*cannot save it and read it back: [^\n]+\Z"):
        run.train()
    assert files(tmp_path / "out") == NOTHING


def test_a_disk_too_small_for_what_will_be_written_is_told_before_the_first_step(world, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    refused(world.align(tmp_path / "out", method="dpo"), f"fpo: {tmp_path / 'out'} (about ", "no space left on device")
    assert files(tmp_path / "out") == NOTHING


@pytest.mark.parametrize(("optim", "every"), [("adamw_torch_fused", 1), ("rmsprop", 2), ("adamw_torch_fused", 100)])
def test_what_a_run_leaves_is_what_was_reckoned_and_its_small_files(world, tmp_path, optim, every):
    run = trainer(world, tmp_path / "out", world.policy(), optim=optim, save_steps=every)
    expected = _bytes_to_come(run)
    run.train()
    run.save_model()
    written = sum(map(len, files(tmp_path / "out").values()))
    assert expected <= written < expected + 200_000


def test_a_tracker_that_does_not_start_stops_the_run(world, tmp_path):
    class NowhereCallback(TrainerCallback):
        _initialized = False

        def setup(self, args: Any, state: Any, model: Any, **kwargs: Any) -> None:
            raise RuntimeError("api_key not configured\n(no-tty)")

        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            self.setup(args, state, model)

    run = trainer(world, tmp_path / "out", world.policy())
    run.add_callback(NowhereCallback)
    with pytest.raises(ValueError, match=r"\A--report-to: Nowhere does not start: api_key not configured \(no-tty\)\Z"):
        run.train()
    assert files(tmp_path / "out") == NOTHING


def test_an_upload_without_the_hub_is_refused_before_the_model_is_trained(world, tmp_path):
    refused(world.align(tmp_path / "out", "--push-to-hub", method="dpo"), "--push-to-hub")
    assert files(tmp_path / "out") == NOTHING


PICTURES = {"image_processor_type": "Gemma3ImageProcessor", "size": {"height": 28, "width": 28}}
PROCESSOR = {"processor_class": "Gemma3Processor", "image_seq_length": 4}


def gemma3_that_sees(seed: int = 0, **changes: Any) -> Any:
    """Gemma-3's multimodal class; four layers of 32 that attend within 8 tokens, every other one to all."""
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8, **changes}
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    config = Gemma3Config(
        text_config=text | {"layer_types": ["sliding_attention", "full_attention"] * 2},
        vision_config=vision,
        mm_tokens_per_image=4,
        **{"image_token_index": 5, "boi_token_index": 6, "eoi_token_index": 7},
    )
    torch.manual_seed(seed)
    return Gemma3ForConditionalGeneration(config).eval()


@pytest.fixture(scope="module")
def seeing(world, tmp_path_factory) -> tuple[Path, Path]:
    """The model with its processor's files, and a cache of it."""
    folder = tmp_path_factory.mktemp("seeing")
    save_model(folder / "model", gemma3_that_sees, gemma())
    (folder / "model" / "preprocessor_config.json").write_text(json.dumps(PICTURES))
    (folder / "model" / "processor_config.json").write_text(json.dumps(PROCESSOR))
    ran(world.precompute(folder / "cache", model=folder / "model", sae=world.saes[0]))
    return folder / "model", folder / "cache"


def test_a_model_that_sees_is_saved_with_what_its_processor_needs(world, seeing, tmp_path):
    model, cache = seeing
    ran(align(world, tmp_path / "out", model, cache=cache, snapshot_steps=1, max_steps=2, save_steps=1))
    for folder in ("", "checkpoint-1", "snapshots/step-000001"):
        for name in ("preprocessor_config.json", "processor_config.json"):
            assert (tmp_path / "out" / folder / name).read_bytes() == (model / name).read_bytes()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    before = AutoModelForCausalLM.from_pretrained(model)
    assert type(saved) is type(before) is Gemma3ForConditionalGeneration
    moved = {name for name, weight in saved.named_parameters() if not torch.equal(weight, before.get_parameter(name))}
    assert moved and all("language_model" in name for name in moved)


def test_an_adapter_wraps_what_training_on_text_runs(world, seeing, tmp_path):
    model, cache = seeing
    ran(align(world, tmp_path / "out", model, cache=cache, lora_r=2, lr=1e-3))
    with safe_open(tmp_path / "out" / "adapter_model.safetensors", "pt") as file:
        names = list(file.keys())
        assert all(file.get_tensor(name).any() for name in names if "lora_B" in name)
    assert len(names) == 2 * 4 * 7  # four layers of seven maps
    assert all("language_model.layers" in name for name in names)
    assert outside_decoder(world.policy()) is None


@pytest.mark.parametrize("afterwards", [False, True])
def test_merged_the_adapter_s_model_sees_as_before(world, seeing, tmp_path, afterwards):
    model, cache = seeing
    if afterwards:
        ran(align(world, tmp_path / "run", model, cache=cache, lora_r=2, lr=1e-3))
        ran(fpo("merge", str(tmp_path / "run"), "--out", str(tmp_path / "out")))
    else:
        ran(align(world, tmp_path / "out", model, "--merge", cache=cache, lora_r=2, lr=1e-3))
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (model, tmp_path / "out"))
    for name, weight in before.named_parameters():
        if "vision" in name or "projector" in name:
            assert torch.equal(weight, after.get_parameter(name))
    assert (tmp_path / "out" / "processor_config.json").exists()
