"""What `fpo.stages` and `fpo.cache` offer, and that programs written as for TRL's trainers work."""

import importlib
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from fpo.cache import Cache, open_cache
from fpo.stages import FPOConfig, FPOTrainer, find_model, load_sae, load_tokenizer
from tiny_tokenizers import chatml
from tiny_world import SITES, ran
from transformers import AutoModelForCausalLM, AutoTokenizer

README = Path(__file__).parents[1] / "README.md"
HEAVY = ("torch", "transformers", "sae_lens", "datasets", "pyarrow", "peft", "numpy")


@pytest.mark.parametrize("package", ["fpo.stages", "fpo.cache"])
def test_importing_a_package_is_instant_and_says_what_it_offers(package):
    program = (
        f"import sys, {package} as package\n"
        f"print([name for name in {HEAVY} if name in sys.modules], dir(package) == sorted(package.__all__))"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[] True"
    offered = importlib.import_module(package)
    for name in offered.__all__:
        assert getattr(offered, name) is not None
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'GRPOTrainer'"):
        offered.GRPOTrainer  # noqa: B018


@pytest.fixture
def folder(world, tmp_path, monkeypatch) -> Path:
    """A folder in which the README's names stand for tiny things."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "SFT_MODEL").symlink_to(world.gemma)
    (tmp_path / "SAE").symlink_to(world.saes[0])
    ran(world.precompute(tmp_path / "caches" / "uf", sae=world.saes[0]))
    return tmp_path


def test_the_readme_s_block_leaves_a_model_that_loads_and_generates(world, folder, capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    training = next(i for i, block in enumerate(blocks) if "FPOTrainer(" in block)
    for number, block in enumerate(blocks[training : training + 2]):
        (folder / f"block_{number}.py").write_text(block)
        runpy.run_path(f"block_{number}.py")
    assert "What is the capital of France?" in capsys.readouterr().out
    names = {path.name for path in (folder / "runs" / "fpo").iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja", "README.md"} <= names
    assert "training_args.bin" not in names
    template = open_cache(world.cache, sites=[]).manifest.meaning.chat_template
    assert AutoTokenizer.from_pretrained("runs/fpo").chat_template == template


@pytest.fixture
def trainer(world, tmp_path) -> Callable[..., FPOTrainer]:
    """A trainer as people who come from TRL write one."""

    def make(**changes: Any) -> FPOTrainer:
        settings = {"per_device_train_batch_size": 6, "warmup_steps": 0, "learning_rate": 1e-3, "logging_steps": 1}
        args = FPOConfig(output_dir=str(tmp_path / "run"), use_cpu=True, report_to="none", max_steps=2, **settings)
        policy = AutoModelForCausalLM.from_pretrained(world.gemma, dtype=torch.float32, attn_implementation="packed")
        given: dict[str, Any] = {"model": policy, "args": args, "train_dataset": world.open()}
        given |= {"saes": [world.load_sae()], "processing_class": AutoTokenizer.from_pretrained(world.gemma)}
        return FPOTrainer(**given | changes)

    return make


def test_the_arguments_have_trl_s_names(world, trainer, tmp_path):
    made = trainer(eval_dataset=world.open(name="eval_cache"))
    before = {name: weight.clone() for name, weight in made.model.named_parameters()}
    made.train()
    made.save_model(str(tmp_path / "out"))
    assert made.evaluate()["eval_loss"] > 0
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert any(not torch.equal(weight, before[name]) for name, weight in saved.named_parameters())
    template = world.open().manifest.meaning.chat_template
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == template


def test_a_model_by_name_is_that_model_with_its_tokenizer(world, trainer):
    by_name, by_hand = trainer(model=str(world.gemma), processing_class=None), trainer()
    for made in (by_name, by_hand):
        made.train()
    assert by_name.processing_class.get_vocab() == by_hand.processing_class.get_vocab()
    found, expected = (made.state.log_history for made in (by_name, by_hand))
    for name in ("loss", "grad_norm", "features/mse_chosen"):
        assert [line[name] for line in found if "loss" in line] == [line[name] for line in expected if "loss" in line]


@pytest.mark.parametrize("name", ["train_dataset", "eval_dataset"])
@pytest.mark.parametrize(
    "data",
    [datasets.Dataset.from_dict({"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]}), [{"chosen": "b"}], "caches/uf"],
    ids=lambda data: type(data).__name__,
)
def test_data_that_are_no_cache_get_a_line_that_says_what_one_is(trainer, name, data):
    with pytest.raises(
        ValueError, match=rf"\A{name}: expected a cache, found [^\n]*fpo precompute[^\n]*open_cache[^\n]*\Z"
    ):
        trainer(**{name: data})


def test_another_tokenizer_or_template_than_the_cache_s_is_refused(world, trainer):
    with pytest.raises(ValueError, match=r"\Aprocessing_class: expected the cache's tokenizer, found another[^\n]*\Z"):
        trainer(processing_class=chatml())
    tokenizer = AutoTokenizer.from_pretrained(world.gemma)
    tokenizer.chat_template = "{{ messages }}"
    with pytest.raises(ValueError, match=r"\Aprocessing_class: expected the cache's chat template[^\n]*\Z"):
        trainer(processing_class=tokenizer)


def test_the_types_are_those_of_the_rooms(world):
    assert isinstance(world.open(), Cache)
    assert load_sae(str(world.saes[0])).site == SITES[0]
    assert (
        load_tokenizer(find_model(str(world.gemma))).get_vocab()
        == load_tokenizer(find_model(str(world.gemma))).get_vocab()
    )
