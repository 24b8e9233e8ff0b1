from dataclasses import replace

import pytest
from fpo.pipeline.config import RunConfig
from fpo.pipeline.report.amounts import Data
from fpo.pipeline.report.costs import COSTS, Task, training_steps
from fpo.pipeline.report.rates import Rates
from fpo.pipeline.report.shapes import shape_of, shape_of_config
from hypothesis import given
from hypothesis import strategies as st
from pairs import many_examples
from tiny_world import ran
from transformers import Gemma2Config

GPU = Rates("a GPU", True, 1e15, 1e14, 3e12, 0.5, 0.5, 1e-4)
GEMMA = shape_of_config(Gemma2Config(), "gemma-2-2b")
PAIRS = Data(61_135, 185, 330, 2, "")
OPTIONS = {"max_length": 2048, "max_prompt_length": 1024, "token_budget": 4096, "dtype": "bf16"}
COMMANDS = sorted(COSTS)


def task(data: Data = PAIRS, widths: tuple[int, ...] = (), rates: Rates = GPU, shape=GEMMA, **options) -> Task:
    given = {"activation_checkpointing": True, "model": "policy", **OPTIONS, **options}
    return Task(RunConfig(**given), shape, data, widths, rates)


def train(**options):
    return COSTS["align"](task(**options))


def test_what_distinguishes_trainings_in_memory():
    weights, plain = 4 * GEMMA.parameters, train()
    assert train(reference="reference").memory - plain.memory == weights
    assert plain.memory - train(optimizer="rmsprop").memory == weights
    assert train(widths=(16_384,)).memory - plain.memory == 2 * 4 * 2304 * 16_384
    assert train(activation_checkpointing=False).memory > plain.memory
    assert plain.memory < train(checkpoint_every=3).memory < train(activation_checkpointing=False).memory
    assert train(lora_r=8).memory < plain.memory - 2 * weights
    # Weights, gradients, both of Adam's moments, and autocast's copies are there at once.
    assert plain.memory > (4 + 4 + 8 + 2) * GEMMA.parameters


def test_fpo_on_gemma_2_2b_fits_the_paper_s_gpu_and_kl_methods_need_more():
    fpo, kl = train(widths=(16_384,)).memory, train(reference="reference").memory
    assert 45e9 < fpo < kl < 80e9


def test_time_is_that_of_the_flops():
    free = replace(GPU, training=1.0, layer_seconds=0.0)
    layers = GEMMA.layer_flops(PAIRS.count * PAIRS.tokens, PAIRS.count * PAIRS.attended)
    head = GEMMA.head_flops(PAIRS.count * PAIRS.answered)
    sae = 2 * 2304 * 16_384 * PAIRS.count * PAIRS.answered
    assert train(rates=free).seconds == pytest.approx((4 * layers + 4 * head) / 1e15)
    assert train(rates=free, activation_checkpointing=False).seconds == pytest.approx((3 * layers + 4 * head) / 1e15)
    assert train(rates=free, checkpoint_every=2).seconds == pytest.approx((3.5 * layers + 4 * head) / 1e15)
    assert train(rates=free, reference="r").seconds == pytest.approx((5 * layers + 6 * head) / 1e15)
    assert train(rates=free, widths=(16_384,)).seconds == pytest.approx((4 * layers + 4 * head) / 1e15 + sae / 1e14)
    assert train(rates=replace(free, training=0.5)).seconds == pytest.approx(2 * train(rates=free).seconds)
    assert train(rates=free, epochs=2).seconds == pytest.approx(2 * train(rates=free).seconds)
    assert train(rates=free, lora_r=8).seconds == pytest.approx((3 * layers + 3 * head) / 1e15)
    once = COSTS["precompute"](task(rates=replace(free, inference=1.0)))
    assert once.seconds == pytest.approx((layers + head) / 1e15)


def test_steps_are_the_trainer_s():
    assert training_steps(RunConfig(), PAIRS.count) == 1911
    assert training_steps(RunConfig(epochs=2), PAIRS.count) == 3822
    assert training_steps(RunConfig(max_steps=7, epochs=3), PAIRS.count) == 7
    assert train(max_steps=10).seconds == pytest.approx(train(max_steps=1).seconds * 10, rel=1e-3)


def test_a_cache_has_the_size_that_was_measured():
    # README: 128 pairs, 78,112 tokens, one site, 512 of 4,096 features kept, 5,906 bytes a pair.
    measured = Data(128, 110.25, 250, 2, "")
    kept = COSTS["precompute"](task(measured, widths=(4096,))).disk / 128
    assert kept == pytest.approx(5906, rel=0.02)
    both = COSTS["precompute"](task(measured, widths=(4096, 4096))).disk / 128
    assert 1.7 < both / kept < 2
    assert COSTS["precompute"](task(measured, widths=(4096,), keep_features="all")).disk / 128 > 3 * kept


def test_a_run_leaves_the_weights_and_optimiser_states_that_were_predicted(world, tmp_path):
    ran(world.align(tmp_path / "run", method="dpo", save_steps=1, snapshot_steps=1, epochs=2))
    files = [*(tmp_path / "run").rglob("*.safetensors"), *(tmp_path / "run").rglob("optimizer.pt")]
    assert len(files) == 1 + 2 * 2 + 3  # the result, two checkpoints of four, the snapshots before the end
    predicted = COSTS["align"](
        task(
            Data(12, 16, 16, 2, ""),
            shape=shape_of(str(world.gemma)),
            batch_size=6,
            epochs=2,
            save_steps=1,
            snapshot_steps=1,
        )
    ).disk
    assert sum(file.stat().st_size for file in files) == pytest.approx(predicted, rel=0.1)


def test_an_evaluation_costs_its_pairs_its_answers_and_a_second_model():
    def evaluate(**options):
        return COSTS["evaluate"](task(Data(2000, 185, 330, 2, ""), (16_384,), **options))

    pairs = evaluate(prompts=0)
    assert pairs.disk == 0
    assert evaluate(samples=50).seconds > evaluate().seconds > pairs.seconds
    assert evaluate(max_new_tokens=1024).seconds > evaluate().seconds
    assert evaluate(prompts=0, reference="policy").memory == pairs.memory
    assert evaluate(prompts=0, reference="other").memory - pairs.memory == 4 * GEMMA.parameters
    assert evaluate(prompts=0, reference="other").seconds > 1.5 * pairs.seconds
    cached = GEMMA.kv_bytes(64 * (1024 + 512), 2)
    assert evaluate(generation_batch=256).memory > evaluate().memory + cached


def test_an_sae_s_training_leaves_its_weights():
    assert COSTS["train-sae"](task(width=4096)).disk == 4 * 2 * 2304 * 4096


@pytest.mark.parametrize("command", COMMANDS)
@many_examples
@given(
    count=st.integers(1, 10**6),
    prompt=st.integers(1, 900),
    response=st.integers(1, 900),
    width=st.integers(1, 10**5),
    layers=st.integers(1, 60),
    grown=st.sampled_from(["count", "prompt", "response", "width", "layers", "hidden"]),
    factor=st.integers(2, 4),
)
def test_more_of_anything_never_takes_less(command, count, prompt, response, width, layers, grown, factor):
    shape = replace(GEMMA, layers=layers)
    plain = task(Data(count, prompt, response, 2, ""), (width,), shape=shape)
    if grown in ("count", "prompt", "response"):
        larger = replace(plain, data=replace(plain.data, **{grown: factor * getattr(plain.data, grown)}))
    elif grown == "width":
        larger = replace(plain, widths=(factor * width,))
    else:
        larger = replace(
            plain, shape=replace(shape, **{grown: factor * getattr(shape, grown)}, body=factor * shape.body)
        )
    less, more = COSTS[command](plain), COSTS[command](larger)
    assert less.seconds * (1 - 1e-9) <= more.seconds
    assert less.disk * (1 - 1e-9) <= more.disk
    # A longer prompt leaves the longest pair less room for its responses, which stand in it twice.
    assert less.memory <= more.memory or grown == "prompt"
