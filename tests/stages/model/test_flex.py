"""Compiled attention: what it computes, and how often it is compiled.

A CPU has the forward of flex attention and no backward. Where a backward is wanted its check is switched off, and torch
runs the operations that a GPU's kernel stands for, after everything that torch compiles has been traced as on a GPU.
"""

import logging
from typing import Any

import pytest
import torch
from fpo.stages.model import flex
from fpo.stages.model.flex import FLEX
from fpo.stages.scoring.forward import row_layout, score_row
from fpo.stages.scoring.packing import pack
from fpo.stages.scoring.supported import check_model
from fpo.stages.train import memory
from fpo.stages.train.align import FPOTrainer
from fpo.stages.train.config import FPOConfig
from pairs import assert_same_gradients, calm_gemma2, calm_llama, random_pair, random_pairs
from tiny import tiny_family, tiny_sae
from torch._dynamo.utils import counters
from torch.nn.attention import flex_attention

# torch's own look at what it compiles.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")

SAES = [tiny_sae()]
MODELS = {
    "gemma2": calm_gemma2,
    "gemma3": lambda **kwargs: tiny_family("gemma3", attention=kwargs["attn_implementation"]),
    "llama": calm_llama,
    "mistral": lambda **kwargs: tiny_family("mistral", attention=kwargs["attn_implementation"]),
}


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


@pytest.mark.parametrize("recipe", ["fp32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_values_and_gradients_are_those_of_eager_attention(name, recipe):
    found, expected = (MODELS[name](attn_implementation=attention).train() for attention in (FLEX, "eager"))
    layout = row_layout(found)
    assert set(layout.windows) == {"gemma2": {None, 8}, "gemma3": {None, 8}, "llama": {None}, "mistral": {8}}[name]
    (row,) = pack(random_pairs(1, 6), 1000, layout)
    gradients = []
    for model in (found, expected):
        scores = score_row(model, row, SAES, recipe)
        weights = torch.linspace(-1, 1, len(scores.logps_R))
        (scores.logps_R * weights).sum().backward()
        gradients.append((scores, {name: weight.grad for name, weight in model.named_parameters()}))
    (ours, our_gradients), (theirs, their_gradients) = gradients
    tolerance = 2e-6 if recipe == "fp32" else 0.2
    torch.testing.assert_close(ours.token_logps_T, theirs.token_logps_T, rtol=0, atol=tolerance)
    assert_same_gradients(our_gradients, their_gradients, 1e-4 if recipe == "fp32" else 0.3)


@pytest.mark.slow
def test_the_compiled_forward_scores_as_eager_does(monkeypatch):
    monkeypatch.setattr(flex, "BACKEND", "inductor")
    model = calm_gemma2(attn_implementation=FLEX)
    (row,) = pack(random_pairs(1, 3), 1000, row_layout(model))
    with torch.no_grad():
        found, expected = score_row(model, row, SAES, "fp32"), score_row(calm_gemma2(), row, SAES, "fp32")
    torch.testing.assert_close(found.token_logps_T, expected.token_logps_T, rtol=0, atol=2e-6)


@pytest.mark.slow
def test_one_graph_with_gradient_and_one_without_serve_rows_of_all_lengths():
    model = calm_gemma2(attn_implementation=FLEX).train()
    check_model(model)
    assert compilations() == 1, "packed rows are tried, and sequences that are not packed are no rows"
    seen = set()
    for number in range(20):
        (row,) = pack([random_pair(5 + 40 * number, 3, 4)], 10, row_layout(model))
        seen.add(row.input_ids_L.numel())
        with torch.no_grad():
            score_row(model, row, [], "fp32")
        score_row(model, row, [], "fp32").logps_R.sum().backward()
    assert len(seen) > 5
    assert compilations() == 2


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fpo", "tdpo2"])
def test_a_whole_run_compiles_attention_twice(world, tmp_path, method):
    """Model check, parity, 20 rows, evaluation, a live reference."""

    def model() -> Any:
        loaded = world.policy()
        loaded.set_attn_implementation(FLEX)
        return loaded

    sites = (0,) if method == "fpo" else ()
    settings = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "warmup_steps": 0}
    trainer = FPOTrainer(
        model(),
        FPOConfig(
            str(tmp_path),
            method=method,
            max_steps=10,
            logging_steps=2,
            token_budget=1,
            learning_rate=1e-3,
            per_device_train_batch_size=2,
            eval_strategy="steps",
            eval_steps=5,
            **settings,
        ),
        world.open(sites),
        world.open(sites, "eval_cache"),
        saes=[world.load_sae(0)] if sites else (),
        reference=None if sites else model(),
    )
    trainer.train()
    assert compilations() == 2


def test_falling_back_is_an_error_never_a_warning():
    model = calm_gemma2(attn_implementation=FLEX)
    (row,) = pack(random_pairs(1, 3), 1000, row_layout(model))
    with torch.compiler.set_stance("force_eager"), torch.no_grad(), pytest.raises(RuntimeError, match="switched off"):
        score_row(model, row, [], "fp32")
    with torch._dynamo.config.patch(recompile_limit=1):
        with torch.no_grad():
            score_row(model, row, [], "fp32")
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            score_row(model.train(), row, [], "fp32")
