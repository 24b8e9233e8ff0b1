"""A model's answers to prompts, generated in batches.

In: a causal LM and prompts as token ids, each ending with what opens the answer. Out: token ids of the answers.

Tokens are drawn by nucleus sampling (Holtzman et al., ICLR 2020): from the model's distribution at a temperature, cut
to the smallest set of likeliest tokens that has a probability of at least `top_p`; at temperature 0 the likeliest token
is taken. The model's own generation settings (top-k, penalties, further end tokens) play no part.

Shapes: B answers of a batch, L positions of a padded prompt.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from ...cache.errors import UserError
from ...cache.schema import Int32
from ..model.flex import FLEX
from ..scoring.packing import named


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn.

    Attributes:
        temperature: divides the logits; at 0 the likeliest token is always taken, whatever `top_p` and `seed` are.
        top_p: probability of the nucleus; 1 is the whole distribution.
        max_new_tokens: an answer is cut at this length.
        seed: of the random numbers; the answers depend on it and on `batch`.
        batch: answers generated at a time.

    Raises:
        UserError: a value is out of its range.
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
                raise UserError(f"{name}: expected {expected}, found {getattr(self, name)}")

    def generation_config(self, end_id: int) -> GenerationConfig:
        """The same for transformers."""
        drawn = self.temperature > 0
        return GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            do_sample=drawn,
            eos_token_id=end_id,
            pad_token_id=end_id,  # any token would do: padding is masked, and what follows an answer's end is cut
            use_cache=True,
            # top_k=0 sets no limit
            **({"temperature": float(self.temperature), "top_p": self.top_p, "top_k": 0} if drawn else {}),
        )


def check_room(model: PreTrainedModel, where: str, prompt_tokens: int, new_tokens: int) -> None:
    """Checks that a prompt, and as many new tokens, fit into the context that the model's configuration names, if any.

    Raises:
        UserError: they do not; begins with `where`.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and prompt_tokens + new_tokens > limit:
        raise UserError(
            f"{where}: expected prompt and answers within the model's {limit} tokens, found {prompt_tokens} of the "
            f"prompt and up to {new_tokens} more; lower max_new_tokens or leave out the prompt"
        )


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

    The same arguments give the same answers. The state of torch's random numbers, and the model's mode and settings,
    are afterwards what they were before.

    Args:
        model: the causal LM.
        prompts: int32, token ids of each prompt, at least one.
        samples: answers a prompt.
        sampling: how tokens are drawn.
        end_id: the token that closes an answer.
        on_batch: called after each batch with its number of answers, for progress.

    Returns:
        For each prompt its answers: int32, without the prompt, with `end_id` at the end unless cut at `max_new_tokens`.

    Raises:
        UserError: a prompt is empty, or has no room for an answer in the model's context.
        FloatingPointError: a logit is not finite; names the prompts.
    """
    for number, ids in enumerate(prompts):
        if not len(ids):
            raise UserError(f"prompt {number}: expected at least one token, found none; leave it out")
        check_room(model, f"prompt {number}", len(ids), sampling.max_new_tokens)
    # Prompts of like length pad little; the longest first, so that what does not fit into memory fails at once.
    by_length = sorted(range(len(prompts)), key=lambda prompt: -len(prompts[prompt]))
    queue = [prompt for prompt in by_length for _ in range(samples)]
    answers: list[list[Int32]] = [[] for _ in prompts]
    with _ready_to_generate(model, sampling.generation_config(end_id)):
        for number, first in enumerate(range(0, len(queue), sampling.batch)):
            batch = queue[first : first + sampling.batch]
            seed = np.random.SeedSequence([sampling.seed, number]).generate_state(1, np.uint64)[0]
            # All devices, because a seed is set on all of them.
            with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
                torch.manual_seed(int(seed))
                found, finite_B = _generate_batch(model, [prompts[prompt] for prompt in batch], end_id)
            if bad := sorted({prompt for prompt, finite in zip(batch, finite_B, strict=True) if not finite}):
                raise FloatingPointError(f"{named(list(map(str, bad)), 'prompt')}: not finite: logits of an answer")
            for prompt, answer in zip(batch, found, strict=True):
                answers[prompt].append(answer)
            if on_batch:
                on_batch(len(batch))
    return answers


@contextmanager
def _ready_to_generate(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Gives the model what `generate` needs, and its own mode and settings back at the end."""
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
    """Notes which answers had a logit of NaN or +infinity, and gives those finite ones, or drawing would fail."""

    def __init__(self) -> None:
        self.answers_B: Tensor | None = None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        finite_B = scores.amax(-1).isfinite()  # -inf is a token that cannot be
        self.answers_B = finite_B if self.answers_B is None else self.answers_B & finite_B
        return torch.where(finite_B[:, None], scores, 0)  # type: ignore[return-value]


def _generate_batch(model: PreTrainedModel, prompts: Sequence[Int32], end_id: int) -> tuple[list[Int32], list[bool]]:
    """Answers, and whether all logits that they were drawn from are finite."""
    finite = _Finite()
    rows = [torch.from_numpy(prompt.astype(np.int64)) for prompt in prompts]
    prompts_BL = pad_sequence(rows, batch_first=True, padding_value=end_id, padding_side="left")
    mask_BL = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
    run: Any = model.generate  # torch's types take a module's attributes for tensors
    output = run(
        inputs=prompts_BL.to(model.device),
        attention_mask=mask_BL.to(model.device),
        generation_config=model.generation_config,
        logits_processor=LogitsProcessorList([finite]),
    )
    assert finite.answers_B is not None
    answers = output[:, prompts_BL.shape[1] :].cpu().numpy().astype(np.int32)
    ends = [np.flatnonzero(answer == end_id)[:1] for answer in answers]
    cut = [answer[: int(end[0]) + 1] if len(end) else answer for answer, end in zip(answers, ends, strict=True)]
    return cut, finite.answers_B.tolist()
