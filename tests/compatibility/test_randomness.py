"""Every causal architecture of the installed transformers, random in every way that it has: once loaded, in none.

A forward pass in the mode of training gives what plain transformers gives in evaluation, whatever the seed.
"""

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from fpo.stages.model.models import find_model, load_model
from fpo.stages.scoring.supported import policy_mode
from tiny_architectures import ARCHITECTURES, tiny_config, tiny_model
from transformers import AutoModelForCausalLM, PreTrainedConfig

# One of each way to be random: modules, numbers of layers, functions, skipped layers, noise on routers and inputs.
FAMILIES = ("biogpt", "dbrx", "gpt2", "mixtral", "opt", "phimoe", "seed_oss", "starcoder2", "xglm")


def made_random(config: Any) -> int:
    """Sets every number that makes a model random to 0.3, in parts too; returns how many there are."""
    count = 0
    for name, value in list(vars(config).items()):
        if isinstance(value, PreTrainedConfig):
            count += made_random(value)
        elif any(part in name for part in ("drop", "jitter")) and not isinstance(value, bool | str):
            setattr(config, name, 0.3)
            count += 1
    return count


def is_random(kind: str, folder: Path) -> bool | None:
    """Whether the architecture is, in the mode of training; None if nothing could be, or it cannot be built here."""
    tokens = torch.arange(3, 30)[None]
    try:
        config = tiny_config(kind)
        if not made_random(config):
            return None
        tiny_model(config).save_pretrained(folder)
        plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
        expected = plain.eval()(input_ids=tokens, use_cache=False).logits
        model = load_model(find_model(str(folder)), attention="eager", device="cpu")
        model(input_ids=tokens, use_cache=False)
    except Exception:  # noqa: BLE001 (the matrix of models says which, and why)
        return None
    for checkpointing in (False, True):
        if checkpointing and model.supports_gradient_checkpointing:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        policy_mode(model, checkpointing=checkpointing)
        for seed in (0, 1):
            torch.manual_seed(seed)
            found = model(input_ids=tokens, use_cache=False).logits
            if not torch.allclose(found, expected, atol=1e-6):
                return True
    return False


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", FAMILIES)
def test_a_family_is_not_random_in_training(kind, tmp_path):
    assert is_random(kind, tmp_path) is False


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_no_architecture_is_random_in_training():
    found = {}
    for kind in ARCHITECTURES:
        with tempfile.TemporaryDirectory() as folder:
            found[kind] = is_random(kind, Path(folder))
    assert [kind for kind, random in found.items() if random] == []
    assert sum(random is False for random in found.values()) > 100
