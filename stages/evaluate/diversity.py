"""Diversity H of a policy's answers (method.md section 6).

In: a policy and prompts. Out: sampled answers with their log-probabilities, and four means with confidence intervals:
H, how much the answers repeat themselves, their length, and the share that ended by themselves.

H is E_q[-(1/|y|) log π_θ(y|x)] in nats per token. Answers are drawn from q, the policy cut to its nucleus, and scored
under the whole policy by the code that scores every response.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...cache.reader import Cache
from ...cache.schema import Int32, Pair
from ..data.chat import ChatFormat
from ..model.models import Recipe, autocast
from ..scoring.measure import measure_pairs
from .generate import Sampling, generate
from .heldout import Estimate, estimate


@dataclass(frozen=True, eq=False)
class Sample:
    """One sampled answer.

    Attributes:
        ids: int32, the answer's tokens, with the closing one if it was reached.
        logp: log π_θ(y|x) under the whole policy, nats, summed over tokens.
        finished: whether the closing token was reached.
    """

    ids: Int32
    logp: float
    finished: bool


def distinct_prompts(cache: Cache, count: int) -> list[Pair]:
    """The first pair of each of the first `count` distinct prompts, or of all where there are fewer.

    Pairs whose responses begin with a turn of the user are left out: no answer follows their prompt.
    """
    found: dict[bytes, Pair] = {}
    for number in range(len(cache)):
        if len(found) == count:
            break
        pair = cache[number].pair
        if not (pair.chosen_learnt[0] and pair.rejected_learnt[0]):
            found.setdefault(pair.prompt_ids.tobytes(), pair)
    return list(found.values())


def closing_token(pairs: Sequence[Pair], chat: ChatFormat) -> int:
    """The token that closes an answer: EOS if it closes more of the pairs' responses than the template's end of turn.

    Pairs of plain text use no template and end with EOS, and a cache does not say whether its pairs were plain text.
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
        prompts: int32, token ids, each ending with what opens the answer.
        samples: answers a prompt.
        sampling: how tokens are drawn.
        end_id: the token that closes an answer.
        recipe: the compute recipe of generation and scoring.
        token_budget: tokens of a packed row when answers are scored.
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
    """Log-probabilities of the answers to each prompt, nats, summed over tokens.

    Two answers are scored as the two sides of a pair. If their number is odd, the last one takes both sides.
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
    """H in nats per token, repetition, length in tokens, share of finished answers; prompts are the resampled units."""
    counts = [len(of_prompt) for of_prompt in samples]

    def mean(value: Callable[[Sample], float]) -> Estimate:
        return estimate([sum(map(value, of_prompt)) for of_prompt in samples], counts)

    return {
        "diversity/entropy": mean(lambda sample: -sample.logp / len(sample.ids)),
        "diversity/repetition": mean(lambda sample: repetition(sample.ids)),
        "length/mean": mean(lambda sample: len(sample.ids)),
        "length/finished": mean(lambda sample: sample.finished),
    }


def repetition(ids: Int32, size: int = 4) -> float:
    """The share of an answer's runs of `size` tokens that came before in it; 0 if it has none.

    It is seq-rep-4 of Welleck et al., *Neural Text Generation with Unlikelihood Training*, ICLR 2020.
    """
    runs = [tuple(ids[start : start + size].tolist()) for start in range(len(ids) - size + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0
