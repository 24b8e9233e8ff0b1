"""Diversity H of a policy's answers (method.md section 6).

In: a policy and prompts. Out: sampled answers, each with its log-probability, and H, their mean length and the share
that ended by themselves, with confidence intervals.

H is E_q[-(1/|y|) log π_θ(y|x)] in nats per token: the answers come from q, the policy truncated to its nucleus, and are
scored under the policy itself, by the code that scores every response.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...cache.reader import Cache
from ...cache.schema import Int32, Pair
from ..data.chat import ChatFormat
from ..model.models import Recipe, autocast
from ..scoring.forward import measure_pairs
from .generate import Sampling, generate
from .heldout import Estimate, estimate


@dataclass(frozen=True, eq=False)
class Sample:
    """One sampled answer.

    Attributes:
        ids: int32, the answer's tokens, with the closing one where it was reached.
        logp: log π_θ(y|x) under the whole distribution, nats, summed over tokens.
        finished: whether it ended by itself.
    """

    ids: Int32
    logp: float
    finished: bool


def distinct_prompts(cache: Cache, count: int) -> list[Pair]:
    """The first pair of each of the first `count` distinct prompts that an answer follows; fewer where there are fewer.

    Some pairs part at a turn of the user's.
    """
    found: dict[bytes, Pair] = {}
    for number in range(len(cache)):
        if len(found) == count:
            break
        pair = cache[number].pair
        if pair.chosen_learnt[0] and pair.rejected_learnt[0]:
            continue
        found.setdefault(pair.prompt_ids.tobytes(), pair)
    return list(found.values())


def closing_token(pairs: Sequence[Pair], chat: ChatFormat) -> int:
    """The token that closes an answer: the template's, or EOS where that is what closes these pairs' responses.

    Pairs of plain text take no template, and a cache does not say which kind it was made of.
    """
    last = [int(ids[-1]) for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids)]
    eos_id: int = chat.tokenizer.eos_token_id
    return eos_id if last.count(eos_id) > last.count(chat.end_id) else chat.end_id


def sample_answers(
    policy: Any,
    prompts: Sequence[Int32],
    *,
    samples: int,
    sampling: Sampling,
    end_id: int,
    recipe: Recipe,
    token_budget: int,
    on_batch: Callable[[int], None] | None = None,
) -> list[list[Sample]]:
    """Samples answers to each prompt and scores them.

    Args:
        policy: the causal LM.
        prompts: token ids, each with the opening of the answer.
        samples: answers a prompt.
        sampling: how tokens are drawn.
        end_id: the token that closes an answer.
        recipe: the compute recipe, of generation and of scoring.
        token_budget: tokens of a packed row, in scoring.
        on_batch: as in `generate`.

    Returns:
        The samples of each prompt.

    Raises:
        FloatingPointError: naming prompt and answers, if a log-probability is not finite.
    """
    with torch.no_grad(), autocast(recipe, next(policy.parameters()).device):
        answers = generate(policy, prompts, samples=samples, sampling=sampling, end_id=end_id, on_batch=on_batch)
    logps = score_answers(policy, prompts, answers, recipe, token_budget)
    return [
        [Sample(ids, logp, bool(ids[-1] == end_id)) for ids, logp in zip(*of_prompt, strict=True)]
        for of_prompt in zip(answers, logps, strict=True)
    ]


def score_answers(
    policy: Any, prompts: Sequence[Int32], answers: Sequence[Sequence[Int32]], recipe: Recipe, token_budget: int
) -> list[list[float]]:
    """Log-probability of each answer, nats, summed over tokens.

    Two answers to a prompt are scored as the two sides of a pair; the odd last one takes both sides and counts once.
    """
    pairs = []
    for number, (prompt, of_prompt) in enumerate(zip(prompts, answers, strict=True)):
        for first in range(0, len(of_prompt), 2):
            second = min(first + 1, len(of_prompt) - 1)
            name = f"of answers {first} and {second} to prompt {number}"
            pairs.append(Pair(name, prompt, of_prompt[first], of_prompt[second]))
    measured = iter(measure_pairs(policy, pairs, [], recipe, token_budget=token_budget, keep_features=None))
    logps = []
    for of_prompt in answers:
        sides = [next(measured) for _ in range(0, len(of_prompt), 2)]
        logps.append([side.logp for pair in sides for side in (pair.chosen, pair.rejected)][: len(of_prompt)])
    return logps


def sample_metrics(samples: Sequence[Sequence[Sample]]) -> dict[str, Estimate]:
    """H in nats per token, the mean length in tokens and the share of finished answers; prompts are resampled whole."""
    counts = [len(of_prompt) for of_prompt in samples]

    def mean(value: Callable[[Sample], float]) -> Estimate:
        return estimate([sum(map(value, of_prompt)) for of_prompt in samples], counts)

    return {
        "diversity/entropy": mean(lambda sample: -sample.logp / len(sample.ids)),
        "length/mean": mean(lambda sample: len(sample.ids)),
        "length/finished": mean(lambda sample: sample.finished),
    }
