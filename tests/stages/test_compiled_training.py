"""Training over compiled code, as on a GPU: attention is a compiled function whose backward takes its saved buffers.

Flex attention has no backward on a CPU. In its place stands eager attention, compiled; like any compiled function it
frees what it saved for its backward while that runs, so that there is one backward a forward.
"""

import logging
from typing import Any

import pytest
import torch
from fpo.stages.train import memory
from fpo.stages.train.align import FPOTrainer
from fpo.stages.train.config import FPOConfig
from fpo.stages.train.methods import METHODS
from tiny_world import SITES
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

# torch's own look at what it compiles.
pytestmark = [
    pytest.mark.slow,  # it compiles
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]

STEPS, EVERY = 6, 2


@pytest.fixture(scope="module", autouse=True)
def compiled_attention():
    logging.getLogger("torch.__trace").handlers.clear()  # torch's trace of what it compiles: pytest would have it kept

    def attend(*args: Any, **kwargs: Any) -> Any:
        return eager_attention_forward(*args, **kwargs)[0], None

    AttentionInterface.register("compiled_eager", torch.compile(attend, backend="aot_eager", dynamic=True))
    AttentionMaskInterface.register("compiled_eager", eager_mask)


@pytest.fixture
def compiled(monkeypatch):
    """Policies and references with compiled attention; their masks are those of eager attention."""
    torch._dynamo.reset()
    monkeypatch.setattr(memory, "COUNTED_STEPS", 0)  # nothing is compiled while operations are counted

    def make(model: Any) -> Any:
        model.set_attn_implementation("compiled_eager")
        return model

    return make


def make_trainer(world, compiled, method: str, out: Any) -> FPOTrainer:
    features = METHODS[method].divergence == "features"
    settings = FPOConfig(
        output_dir=str(out),
        method=method,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        max_steps=STEPS,
        save_steps=EVERY,
        eval_steps=EVERY,
        eval_strategy="steps",
        logging_steps=EVERY,
        warmup_steps=0,
        learning_rate=1e-3,
        per_device_train_batch_size=4,
        token_budget=160,
    )
    sites = (0,) if features else ()
    return FPOTrainer(
        compiled(world.policy()),
        settings,
        world.open(sites),
        world.open(sites, "eval_cache"),
        saes=[world.load_sae(0)] if features else (),
        reference=compiled(world.policy()) if METHODS[method].divergence == "kl" else None,
    )


def test_the_stand_in_allows_one_backward_a_forward(world, compiled):
    model = compiled(world.policy())
    weights = list(model.model.layers[SITES[0].layer].parameters())

    def loss() -> torch.Tensor:
        return model(input_ids=torch.arange(1, 9)[None]).logits.sum()

    torch.autograd.grad(loss(), weights)  # says how the backward is compiled
    with pytest.raises(RuntimeError, match="donated buffers"):
        torch.autograd.grad(loss(), weights, retain_graph=True)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_past_its_logged_steps_evaluates_saves_and_goes_on(world, compiled, tmp_path, method):
    trainer = make_trainer(world, compiled, method, tmp_path)
    trainer.train()
    lines = trainer.state.log_history
    logged = [line for line in lines if "loss" in line]
    assert [line["step"] for line in logged] == [1, 2, 4, 6]
    assert [line["step"] for line in lines if "eval_loss" in line] == [2, 4, 6]
    if METHODS[method].divergence:
        assert logged[0]["constraint/grad_ratio"] == 0
        assert all(line["constraint/grad_ratio"] > 0 for line in logged[1:])
    resumed = make_trainer(world, compiled, method, tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    last = next(line for line in reversed(resumed.state.log_history) if "loss" in line)
    assert last["step"] == STEPS
    assert last["loss"] == pytest.approx(logged[-1]["loss"], rel=1e-6)
