import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from fpo.stages.data.tokenize import Conversation
from fpo.stages.scoring.packing import RowLayout, pack_conversations
from fpo.stages.train.config import RowConfig
from fpo.stages.train.sft import SFTTrainer
from hypothesis import given
from hypothesis import strategies as st
from pairs import assert_same_gradients, calm_gemma2, calm_llama, few_examples, gradients
from torch import Tensor
from transformers import TrainerCallback


def conversation(lengths: list[int], seed: int) -> Conversation:
    """Turns of these lengths, user and assistant in turn."""
    rng = np.random.default_rng(seed)
    learnt = np.repeat([i % 2 == 1 for i in range(len(lengths))], lengths)
    return Conversation(rng.integers(0, 128, learnt.size).astype(np.int32), learnt)


def random_conversations(seed: int, count: int) -> list[Conversation]:
    """One to three answers each, of one token or more; most are longer than the tiny models' sliding window of 8."""
    rng = np.random.default_rng(seed)
    return [
        conversation(rng.integers(1, 13, 2 * rng.integers(1, 4)).tolist(), seed * 1000 + number)
        for number in range(count)
    ]


lengths = st.integers(1, 3).flatmap(lambda n: st.lists(st.integers(1, 12), min_size=2 * n, max_size=2 * n))
conversation_lists = st.lists(st.builds(conversation, lengths, st.integers(0, 99)), min_size=1, max_size=5)


@few_examples
@given(told=conversation_lists, budget=st.integers(1, 120), pad_to=st.integers(1, 32))
def test_every_learnt_token_is_predicted_from_the_token_before_it(told, budget, pad_to):
    rows = list(pack_conversations(told, budget, RowLayout(pad_to)))
    assert sorted(index for row in rows for index in row.pairs) == list(range(len(told)))
    for row in rows:
        parts = zip(row.sources_T.split(list(row.lengths)), row.targets_T.split(list(row.lengths)), strict=True)
        for number, (index, (sources, targets)) in enumerate(zip(row.pairs, parts, strict=True)):
            ids, where = told[index].ids, told[index].learnt.nonzero()[0]
            assert targets.tolist() == ids[where].tolist()
            assert row.input_ids_L[sources].tolist() == ids[where - 1].tolist()
            assert row.position_ids_L[sources].tolist() == (where - 1).tolist()
            assert row.input_ids_L[row.pair_L == number].tolist() == ids.tolist()
        assert row.tokens == sum(told[index].ids.size for index in row.pairs) == int((row.pair_L >= 0).sum())
        assert len(row.pairs) == 1 or row.tokens <= budget
        assert row.input_ids_L.numel() % pad_to == 0


class KeepGradients(TrainerCallback):
    """The gradient of the last step, after all of its batches."""

    found: dict[str, Tensor]

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def trainer(tmp_path) -> Callable[..., SFTTrainer]:
    """A trainer of one step over all conversations, unless told otherwise."""

    def make(model: Any, told: list[Conversation], callbacks: Any = None, **settings: Any) -> SFTTrainer:
        defaults = {"use_cpu": True, "report_to": "none", "save_strategy": "no", "logging_steps": 1, "bf16": False}
        defaults |= {"disable_tqdm": True, "warmup_steps": 0, "max_grad_norm": 0.0, "max_steps": 1}
        defaults |= {"per_device_train_batch_size": len(told)}
        return SFTTrainer(
            model, RowConfig(output_dir=str(tmp_path), **(defaults | settings)), told, callbacks=callbacks
        )

    return make


def loss_alone(model: Any, told: list[Conversation]) -> Tensor:
    """Mean cross entropy of the learnt tokens by plain transformers, one conversation at a time, with full logits."""
    losses, count = [], 0
    for one in told:
        ids = torch.from_numpy(one.ids.astype(np.int64))
        labels = torch.where(torch.from_numpy(one.learnt), ids, -100)[1:]
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum").double())
        count += int((labels != -100).sum())
    return torch.stack(losses).sum() / count


@pytest.mark.parametrize(
    ("make", "batch", "accumulation", "budget"),
    [
        (calm_gemma2, 12, 1, 10_000),
        (calm_gemma2, 5, 3, 60),
        (calm_llama, 12, 1, 60),
        (calm_llama, 5, 3, 60),
        (calm_llama, 1, 12, 60),
    ],
)
def test_loss_and_gradient_are_the_mean_over_learnt_tokens_of_what_plain_transformers_gives(
    trainer, make, batch, accumulation, budget
):
    told, model, keep = random_conversations(1, 12), make(), KeepGradients()
    alone = loss_alone(model, told)
    expected, alone = gradients(model, alone), alone.item()
    run = trainer(
        model,
        told,
        [keep],
        token_budget=budget,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
    )
    run.train()
    assert run.state.log_history[0]["loss"] == pytest.approx(alone, rel=1e-6)
    assert_same_gradients(keep.found, expected, 1e-4)


def test_what_follows_the_last_answer_changes_nothing(trainer):
    told = random_conversations(2, 4)
    longer = [Conversation(np.r_[one.ids, one.ids[:3]], np.r_[one.learnt, [False] * 3]) for one in told]
    found = []
    for conversations in (told, longer):
        run = trainer(calm_llama(), conversations)
        run.train()
        found.append((run.state.log_history[0]["loss"], run.state.log_history[0]["grad_norm"]))
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def test_training_lowers_the_loss_and_says_what_it_cost(trainer, tmp_path):
    told = random_conversations(3, 8)
    run = trainer(calm_llama(), told, max_steps=10, learning_rate=1e-2, token_budget=100)
    run.train()
    losses = [line["loss"] for line in run.state.log_history if "loss" in line]
    assert losses[-1] < 0.7 * losses[0]
    cost = run.state.log_history[-1]
    tokens = 10 * sum(one.ids.size for one in told)
    # The run's own clock starts later and stops earlier.
    assert 0 < cost["train_tokens_per_second"] <= tokens / cost["train_runtime"] * 1.01
    assert "train_peak_memory_bytes" not in cost  # counting tensors costs time: it has to be asked for
    assert not list(tmp_path.rglob("training_args.bin"))


def test_weights_in_bf16_are_refused(trainer):
    with pytest.raises(ValueError, match="float32"):
        trainer(calm_llama().to(torch.bfloat16), random_conversations(4, 1))


def test_a_loss_that_is_not_finite_stops_the_training(trainer):
    told = [dataclasses.replace(one, raw_row=row) for row, one in enumerate(random_conversations(5, 4), start=70)]
    with pytest.raises(
        FloatingPointError, match=r"step 2, conversations 7[0-3], .*: the (loss|gradient's norm) is nan.*; lower --lr"
    ):
        trainer(calm_llama(), told, max_steps=3, learning_rate=1e30).train()
