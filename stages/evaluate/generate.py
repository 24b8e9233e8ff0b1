"""Answers of a model to prompts, in batches: drawn from the nucleus of its distribution, or greedy.

In: a causal LM and prompts as token ids, each with the opening of the answer. Out: token ids of the answers.

A token is drawn from q: the model's distribution at a temperature, cut to the smallest set of most likely tokens that
has a probability of at least `top_p` (nucleus sampling, Holtzman et al., ICLR 2020), and nothing else. What the model's
folder says about generation (top-k, penalties, other ends) plays no part.

Shapes: B answers of a batch, L positions of a padded prompt.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from ..scoring.finite import not_finite
from ..scoring.flex import FLEX

Int32 = NDArray[np.int32]


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn.

    Attributes:
        temperature: what logits are divided by; 0 takes the likeliest token, always (`top_p` and `seed` then say
            nothing).
        top_p: probability of the nucleus; 1 is the whole distribution.
        max_new_tokens: an answer is cut at this length.
        seed: of the random numbers; answers depend on it and on `batch`.
        batch: answers generated at a time.

    Raises:
        ValueError: a value is out of its range.
    """

    temperature: float = 1.0
    top_p: float = 0.95
    max_new_tokens: int = 512
    seed: int = 0
    batch: int = 32

    def __post_init__(self) -> None:
        for name, valid, expected in (
            ("temperature", 0 <= self.temperature < float("inf"), "a number of at least 0"),
            ("top_p", 0 < self.top_p <= 1, "a number above 0 and up to 1"),
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("seed", self.seed >= 0, "at least 0"),
            ("batch", self.batch >= 1, "at least 1"),
        ):
            if not valid:
                raise ValueError(f"{name}: expected {expected}, found {getattr(self, name)}")


def context_length(model: PreTrainedModel) -> int | None:
    """The most tokens of prompt and answer that the model was made for; None where its configuration names none."""
    length: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return length


def generate(
    model: PreTrainedModel,
    prompts: Sequence[Int32],
    *,
    samples: int,
    sampling: Sampling,
    end_id: int,
    on_batch: Callable[[int], None] | None = None,
) -> list[list[Int32]]:
    """Generates answers, in the compute recipe of the caller's autocast.

    The same arguments give the same answers, and the state of torch's random numbers stays as it was.

    Args:
        model: the causal LM; its mode and settings are as before afterwards.
        prompts: int32, token ids of each prompt.
        samples: answers a prompt.
        sampling: how tokens are drawn.
        end_id: the token that closes an answer.
        on_batch: called after each batch with its number of answers, for progress.

    Returns:
        For each prompt its answers: int32, without the prompt, with `end_id` at the end unless cut at `max_new_tokens`.

    Raises:
        ValueError: a prompt is empty, or has no room for an answer in the model's context.
        FloatingPointError: a logit is not finite; names the prompts.
    """
    _check_lengths(model, prompts, sampling.max_new_tokens)
    # Prompts of like length pad little; the longest first, so that what does not fit into memory fails at once.
    by_length = sorted(range(len(prompts)), key=lambda prompt: -len(prompts[prompt]))
    queue = [prompt for prompt in by_length for _ in range(samples)]
    answers: list[list[Int32]] = [[] for _ in prompts]
    with _ready_to_generate(model, _generation_config(sampling, end_id)):
        for number, first in enumerate(range(0, len(queue), sampling.batch)):
            batch = queue[first : first + sampling.batch]
            seed = np.random.SeedSequence([sampling.seed, number]).generate_state(1, np.uint64)[0]
            # All devices, because a seed is set on all of them.
            with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
                torch.manual_seed(int(seed))
                found, finite = _generate_batch(model, [prompts[prompt] for prompt in batch], end_id)
            if bad := sorted({prompt for prompt, whole in zip(batch, finite, strict=True) if not whole}):
                raise not_finite(dict.fromkeys(map(str, bad), "logits of its answer are not finite"), "prompt")
            for prompt, answer in zip(batch, found, strict=True):
                answers[prompt].append(answer)
            if on_batch:
                on_batch(len(batch))
    return answers


def _check_lengths(model: PreTrainedModel, prompts: Sequence[Int32], max_new_tokens: int) -> None:
    limit = context_length(model)
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {number}: expected at least one token, found none; leave it out")
        if limit is not None and len(prompt) + max_new_tokens > limit:
            raise ValueError(
                f"prompt {number}: expected prompt and answer within the model's {limit} tokens, found {len(prompt)} "
                f"and max_new_tokens {max_new_tokens}; leave out the prompt or lower max_new_tokens"
            )


def _generation_config(sampling: Sampling, end_id: int) -> GenerationConfig:
    config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=sampling.temperature > 0,
        eos_token_id=end_id,
        pad_token_id=end_id,  # any token would do: padding is masked, and what follows an answer's end is cut
        use_cache=True,
    )
    if config.do_sample:
        config.update(temperature=float(sampling.temperature), top_p=sampling.top_p, top_k=0)  # top_k=0: no limit
    return config


@contextmanager
def _ready_to_generate(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Lends the model what `generate` needs of it."""
    training, attention, defaults = model.training, model.config._attn_implementation, model.generation_config
    # `attach_scoring` puts another forward in front, which hides the parameters that `generate` looks for.
    attached = vars(model).pop("forward", None)
    try:
        model.eval()
        model.generation_config = config  # transformers takes from here what the configuration in a call leaves open
        if attention == FLEX:  # which is for packed rows
            model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
        yield
    finally:
        if attached is not None:
            model.forward = attached
        model.train(training)
        model.generation_config = defaults
        model.set_attn_implementation(attention)


class _Finite(LogitsProcessor):
    """Notes which answers had a logit of NaN or +infinity; drawing goes on from others, to be thrown away."""

    def __init__(self) -> None:
        self.answers_B: Tensor | None = None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        finite_B = scores.amax(-1).isfinite()  # -inf is a token that cannot be
        self.answers_B = finite_B if self.answers_B is None else self.answers_B & finite_B
        return torch.where(finite_B[:, None], scores, 0)  # type: ignore[return-value]


def _generate_batch(model: PreTrainedModel, prompts: Sequence[Int32], end_id: int) -> tuple[list[Int32], list[bool]]:
    """Answers, and whether all logits that they were drawn from are finite."""
    finite = _Finite()
    longest = max(map(len, prompts))
    prompts_BL = torch.full((len(prompts), longest), end_id)
    mask_BL = torch.zeros((len(prompts), longest), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        prompts_BL[row, longest - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
        mask_BL[row, longest - len(prompt) :] = 1
    run: Any = model.generate  # torch's types take a module's attributes for tensors
    output = run(
        inputs=prompts_BL.to(model.device),
        attention_mask=mask_BL.to(model.device),
        generation_config=model.generation_config,
        logits_processor=LogitsProcessorList([finite]),
    )
    assert finite.answers_B is not None
    answers = output[:, longest:].cpu().numpy().astype(np.int32)
    ends = [np.flatnonzero(answer == end_id)[:1] for answer in answers]
    cut = [answer[: int(end[0]) + 1] if len(end) else answer for answer, end in zip(answers, ends, strict=True)]
    return cut, finite.answers_B.tolist()
