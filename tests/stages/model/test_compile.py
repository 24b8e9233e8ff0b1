"""Layers that are compiled, or whose weights are cast once, compute what they computed before."""

import logging
from typing import Any

import pytest
import torch
from fpo.stages.model import flex
from fpo.stages.model.anatomy import anatomy
from fpo.stages.model.compile import cast_weights, compile_layers
from fpo.stages.model.flex import FLEX
from fpo.stages.model.sae import Site
from fpo.stages.scoring.forward import row_layout, score_row
from fpo.stages.scoring.packing import pack
from fpo.stages.train import memory
from fpo.stages.train.align import FPOTrainer
from fpo.stages.train.config import FPOConfig
from pairs import assert_same_gradients, calm_gemma2, calm_llama, random_pair, random_pairs
from tiny import tiny_family, tiny_sae
from torch._dynamo.utils import counters
from torch.nn.attention import flex_attention

# torch's own look at what it compiles.
pytestmark = [
    pytest.mark.slow,  # it compiles
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]

SAES = [tiny_sae(site=Site(2, "resid_post")), tiny_sae(site=Site(1, "mlp_out"), seed=1)]


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    """Traced as on a GPU; graphs are run by torch's operations."""
    logging.getLogger("torch.__trace").handlers.clear()
    monkeypatch.setattr(flex, "BACKEND", "aot_eager")
    monkeypatch.setattr(flex_attention, "_validate_device", lambda query, key, value: None)
    monkeypatch.setattr(memory, "COUNTED_STEPS", 0)  # nothing is compiled while operations are counted
    torch._dynamo.reset()
    counters.clear()


def compilations() -> int:
    return int(counters["stats"]["unique_graphs"])


def scored(model: Any, recipe: Any, saes: Any = SAES) -> tuple[Any, dict[str, torch.Tensor]]:
    (row,) = pack(random_pairs(1, 6), 1000, row_layout(model))
    scores = score_row(model, row, saes, recipe)
    (scores.logps_R * torch.linspace(-1, 1, len(scores.logps_R))).sum().backward()
    return scores, {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("attention", ["eager", FLEX])
@pytest.mark.parametrize("make", [calm_gemma2, calm_llama])
def test_compiled_layers_give_the_values_gradients_and_sites_of_plain_ones(make, attention):
    found, expected = (make(attn_implementation=attention).train() for _ in range(2))
    compile_layers(found.model.layers, [sae.site for sae in SAES])
    (ours, our_gradients), (theirs, their_gradients) = (scored(model, "fp32") for model in (found, expected))
    torch.testing.assert_close(ours.token_logps_T, theirs.token_logps_T, rtol=0, atol=2e-6)
    for own, other in zip(ours.pooled, theirs.pooled, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-5)
    assert_same_gradients(our_gradients, their_gradients, 1e-4)
    assert compilations() > 0


def test_one_graph_with_gradient_and_one_without_serve_all_layers_and_lengths():
    model = calm_gemma2(attn_implementation=FLEX).train()
    anatomy(model)  # found in a plain forward, once a model
    compile_layers(model.model.layers)
    for number in range(10):
        (row,) = pack([random_pair(5 + 60 * number, 3, 4)], 10, row_layout(model))
        with torch.no_grad():
            score_row(model, row, [], "fp32")
        score_row(model, row, [], "fp32").logps_R.sum().backward()
    assert compilations() == 2


def test_a_model_with_compiled_layers_generates_as_before():
    plain, compiled = calm_gemma2(attn_implementation="eager"), calm_gemma2(attn_implementation="eager")
    compile_layers(compiled.model.layers)
    ids = torch.arange(1, 9)[None]
    found, expected = (model.generate(ids, max_new_tokens=5, do_sample=False) for model in (compiled, plain))
    assert torch.equal(found, expected)
    assert compilations() == 0


@pytest.mark.parametrize("lora", [False, True])
def test_checkpointing_and_adapters_around_compiled_layers_change_no_gradient(lora):
    made = []
    for checkpointed in (False, True):
        model = calm_gemma2(attn_implementation=FLEX).train()
        layers = model.model.layers
        if lora:
            from peft import LoraConfig, get_peft_model

            torch.manual_seed(0)
            model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
            model.train()
        compile_layers(layers)
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        made.append(scored(model, "fp32", SAES[:1]))
    (ours, our_gradients), (theirs, their_gradients) = made
    assert torch.equal(ours.token_logps_T, theirs.token_logps_T)
    assert our_gradients.keys() == their_gradients.keys()
    assert_same_gradients(our_gradients, their_gradients, 1e-5)


@pytest.mark.parametrize("make", [calm_gemma2, calm_llama, lambda **kwargs: tiny_family("qwen2")])
def test_weights_cast_once_give_the_bits_of_autocast(make):
    plain, cast = make(attn_implementation="eager"), make(attn_implementation="eager")
    anatomy(cast)  # which is found in fp32
    cast_weights(cast.model.layers, "fp32")
    assert {weight.dtype for weight in cast.parameters()} == {torch.float32}
    cast_weights(cast.model.layers, "bf16")
    assert {weight.dtype for weight in cast.model.layers.parameters()} == {torch.float32, torch.bfloat16}
    (row,) = pack(random_pairs(1, 6), 1000)
    with torch.no_grad():
        found, expected = (score_row(model, row, SAES, "bf16") for model in (cast, plain))
    assert torch.equal(found.token_logps_T, expected.token_logps_T)
    for ours, theirs in zip(found.pooled, expected.pooled, strict=True):
        assert torch.equal(ours, theirs)
    assert (score_row(plain, row, [], "fp32").token_logps_T - found.token_logps_T).abs().max() > 0


def test_a_run_with_compiled_layers_learns_as_one_without(world, tmp_path):
    losses = []
    for compiled in (False, True):
        policy = world.policy()
        policy.set_attn_implementation(FLEX)
        arguments = FPOConfig(
            str(tmp_path / str(compiled)),
            max_steps=4,
            logging_steps=1,
            token_budget=160,
            learning_rate=1e-3,
            warmup_steps=0,
            per_device_train_batch_size=4,
            compile_layers=compiled,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
        )
        trainer = FPOTrainer(policy, arguments, world.open((0,)), saes=[world.load_sae(0)])
        trainer.train()
        losses.append([line["loss"] for line in trainer.state.log_history if "loss" in line])
    assert len(losses[0]) == 4
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_every_nth_layer_is_checkpointed_and_no_gradient_changes(world, tmp_path):
    found = {}
    for every in (0, 1, 3):
        arguments = FPOConfig(
            str(tmp_path / str(every)),
            method="dpo",
            max_steps=1,
            logging_steps=1,
            per_device_train_batch_size=4,
            activation_checkpointing=every > 0,
            checkpoint_every=max(1, every),
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
        )
        policy = world.policy()
        trainer = FPOTrainer(policy, arguments, world.open(()))
        trainer.train()
        checkpointed = [number for number, layer in enumerate(policy.model.layers) if layer.gradient_checkpointing]
        norm = next(line["grad_norm"] for line in trainer.state.log_history if "grad_norm" in line)
        found[every] = checkpointed, norm
    assert [found[every][0] for every in (0, 1, 3)] == [[], [0, 1, 2, 3], [0, 3]]
    assert found[0][1] == pytest.approx(found[1][1]) == pytest.approx(found[3][1])
