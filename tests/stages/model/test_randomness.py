"""Training computes what evaluation computes: where nothing is learnt every loss is log 2, whatever the model drops."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from cache_rows import MEANING, NUMERICS
from fpo.cache.manifest import Noise, ShardReport
from fpo.cache.reader import Cache, open_cache
from fpo.cache.writer import CacheWriter
from fpo.stages.model.models import find_model, load_model
from fpo.stages.scoring.measure import measure_pairs
from fpo.stages.train.align import FPOTrainer
from fpo.stages.train.config import FPOConfig
from pairs import calm_gemma2, random_pairs
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 256}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
# Numbers of layers, functional dropout, skipped layers, noise on routers, modules; the first four were left on.
RANDOM: dict[str, dict[str, Any]] = {
    "opt": {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.3, "layerdrop": 0.5, **TOKENS},
    "starcoder2": {**GROUPED, "residual_dropout": 0.3, "embedding_dropout": 0.3, "attention_dropout": 0.2, **TOKENS},
    "xglm": {
        **{"vocab_size": 128, "d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48},
        **{"max_position_embeddings": 256, "dropout": 0.3, "activation_dropout": 0.2, "layerdrop": 0.5, **TOKENS},
    },
    "mixtral": {**GROUPED, "router_jitter_noise": 0.5, "num_local_experts": 4, "attention_dropout": 0.2, **TOKENS},
    "phimoe": {**GROUPED, "router_jitter_noise": 0.3, "num_local_experts": 4, "attention_dropout": 0.2, **TOKENS},
    "gpt2": {
        **{"vocab_size": 128, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, **TOKENS},
        **{"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3},
    },
    "gpt_neox": {**SIZES, "intermediate_size": 48, "hidden_dropout": 0.3, "attention_dropout": 0.3, **TOKENS},
}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("FPO_HOME", str(tmp_path / "home"))


def saved(folder: Path, architecture: str) -> str:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **RANDOM[architecture]))
    for weight in model.parameters():
        if weight.ndim > 1:
            weight.data = 0.4 * torch.randn_like(weight)
    model.save_pretrained(folder)
    return str(folder)


def cache_of(folder: Path, model: Any) -> Cache:
    rows = measure_pairs(model, random_pairs(2, 4), [], "fp32", token_budget=1, keep_features=16)
    writer = CacheWriter(folder, dataclasses.replace(MEANING, sites=(), keep_features=16), NUMERICS, len(rows))
    writer.write_shard(rows, ShardReport(0, 0, len(rows), (), {}, Noise(0.0, ())))
    assert writer.finish() is not None
    return open_cache(folder, sites=[])


def trainer(folder: Path, policy: Any, cache: Cache, **settings: Any) -> FPOTrainer:
    args = FPOConfig(
        **{"output_dir": str(folder / "run"), "method": "dpo", "use_cpu": True, "report_to": "none", "max_steps": 4},
        **{"logging_steps": 1, "warmup_steps": 0, "learning_rate": 1e-9, "per_device_train_batch_size": 2},
        **{"save_strategy": "no", "disable_tqdm": True, **settings},
    )
    return FPOTrainer(policy, args, cache)


@pytest.mark.parametrize("architecture", RANDOM)
def test_evaluation_computes_what_it_computes_in_transformers(tmp_path, architecture):
    """PhiMoE's `router_jitter_noise` is a threshold there, and no noise."""
    model = load_model(find_model(saved(tmp_path, architecture)), attention="eager", device="cpu")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager", dtype=torch.float32).eval()
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain(ids).logits)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("architecture", RANDOM)
def test_every_loss_is_log_2_where_nothing_is_learnt(tmp_path, architecture, checkpointing):
    model = load_model(find_model(saved(tmp_path / "model", architecture)), attention="eager", device="cpu")
    trained = trainer(tmp_path, model, cache_of(tmp_path / "cache", model), activation_checkpointing=checkpointing)
    trained.train()
    losses = [line["loss"] for line in trained.state.log_history if "loss" in line]
    assert losses == pytest.approx([math.log(2)] * 4, abs=2e-5)


class Noisy(nn.Module):
    """Randomness by a name that nobody knows, in a module that may save memory."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.temperature, self.gradient_checkpointing = inner, 0.01, False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        found = self.inner(*args, **kwargs)
        return found + self.temperature * torch.randn_like(found) if self.training else found


def noisy() -> Any:
    policy = calm_gemma2()
    policy.model.layers[1].mlp = Noisy(policy.model.layers[1].mlp).eval()
    return policy


def test_what_is_random_by_another_name_does_not_train(tmp_path):
    trained = trainer(tmp_path, noisy(), cache_of(tmp_path / "cache", calm_gemma2()))
    trained.train()
    losses = [line["loss"] for line in trained.state.log_history if "loss" in line]
    assert losses == pytest.approx([math.log(2)] * 4, abs=2e-5)


def test_what_is_random_and_has_to_train_stops_before_the_first_step(tmp_path):
    policy = noisy()
    before = {name: weight.clone() for name, weight in policy.named_parameters()}
    trained = trainer(tmp_path, policy, cache_of(tmp_path / "cache", calm_gemma2()), activation_checkpointing=True)
    with pytest.raises(ValueError, match=r"\Amodel: [^\n]+ nats from one seed to another; [^\n]+\Z"):
        trained.train()
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert all(torch.equal(weight, before[name]) for name, weight in policy.named_parameters())
    assert not policy.training


@pytest.mark.parametrize(("asked", "by_hand", "runs"), [(False, False, 1), (True, False, 2), (False, True, 2)])
def test_activations_are_computed_again_where_that_is_asked_for(tmp_path, asked, by_hand, runs):
    policy = calm_gemma2()
    if by_hand:
        policy.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    trained = trainer(tmp_path, policy, cache_of(tmp_path / "cache", calm_gemma2()), activation_checkpointing=asked)
    count: list[int] = []
    policy.model.layers[1].mlp.register_forward_hook(lambda *_: count.append(1) if torch.is_grad_enabled() else None)
    trained.train()
    assert len(count) == 4 * runs


def test_dropout_of_an_adapter_is_what_its_user_asked_for(tmp_path):
    from peft import LoraConfig, get_peft_model

    policy = calm_gemma2()
    cache = cache_of(tmp_path / "cache", policy)
    torch.manual_seed(0)
    adapted = get_peft_model(policy, LoraConfig(r=2, lora_dropout=0.5, target_modules="all-linear")).eval()
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            weight.data += 0.1
    trained = trainer(tmp_path, adapted, cache)
    trained.args.allow_different_start = True
    trained.train()
    assert len(trained.state.log_history) >= 4
