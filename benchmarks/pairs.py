"""The pairs of a benchmark, and their lengths.

In: a setting. Out: the pairs of a data set, or random tokens with the lengths of one; the shortest serve the warm-up,
and the batches with median padding are measured.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from fpo.cache.errors import UserError
from fpo.cache.schema import Pair, pair_id
from fpo.stages.data.chat import ChatFormat
from fpo.stages.data.preferences import load_preferences
from fpo.stages.data.tokenize import Limits, tokenize_pair

from .setting import Setting

# Standard deviation of the logarithm of random lengths: as in UltraFeedback, most are short and some very long.
LENGTH_SPREAD = 0.6


def real_pairs(setting: Setting, tokenizer: Any) -> list[Pair]:
    """All pairs of the data set, tokenised and truncated."""
    preferences = load_preferences(setting.dataset or "", split=setting.split)
    chat, limits = ChatFormat(tokenizer), Limits(setting.max_length, setting.max_length // 2)
    found = (tokenize_pair(preferences.example(row), row, chat, limits).pair for row in range(len(preferences)))
    return [pair for pair in found if pair is not None]


def random_pairs(setting: Setting, vocabulary: int, count: int = 512) -> list[Pair]:
    """Pairs of random tokens; their lengths have the setting's means, before they are cut to `max_length`."""
    rng = np.random.default_rng(0)
    shift = LENGTH_SPREAD**2 / 2  # the mean of exp(normal) is exp(shift)

    def tokens(mean: float, most: int) -> Any:
        length = int(mean * np.exp(LENGTH_SPREAD * rng.standard_normal() - shift))
        return rng.integers(0, vocabulary, max(2, min(length, most)), dtype=np.int32)

    made = []
    for row in range(count):
        prompt = tokens(setting.prompt, setting.max_length // 2)
        chosen, rejected = (tokens(setting.response, setting.max_length - prompt.size) for _ in range(2))
        made.append(Pair(pair_id(prompt, chosen, rejected, row), prompt, chosen, rejected))
    return made


def size(pair: Pair) -> int:
    """Tokens of a pair, its prompt counted once."""
    return int(pair.prompt_ids.size + pair.chosen_ids.size + pair.rejected_ids.size)


def padded(pairs: Sequence[Pair]) -> int:
    """Tokens of a batch of two sequences a pair (prompt and one response), padded to the longest."""
    longest = max(pair.prompt_ids.size + max(pair.chosen_ids.size, pair.rejected_ids.size) for pair in pairs)
    return int(2 * len(pairs) * longest)


def choose(candidates: Sequence[Pair], setting: Setting) -> list[Pair]:
    """The shortest pairs for the first warm-up step, then the batches with the median ratio of padded to packed tokens.

    A second warm-up step is as the measured ones: a compiler may need to have seen both.

    Raises:
        UserError: if there are too few pairs.
    """
    by_size = sorted(candidates, key=size)
    first, rest = by_size[: setting.batch], by_size[setting.batch :]
    needed = setting.warmup - 1 + setting.steps
    order = np.random.default_rng(0).permutation(len(rest))
    batches = [[rest[i] for i in part] for part in np.split(order, range(setting.batch, len(rest), setting.batch))]
    whole = [batch for batch in batches if len(batch) == setting.batch]
    if len(whole) < needed:
        raise UserError(f"expected {needed} batches of {setting.batch} pairs, found {len(whole)}; give more pairs")
    whole.sort(key=lambda batch: padded(batch) / sum(map(size, batch)))
    start = (len(whole) - needed) // 2
    return [*first, *(pair for batch in whole[start : start + needed] for pair in batch)]


def attended(pair: Pair) -> float:
    """Positions attended to, summed over the tokens of a pair, its prompt computed once."""
    prompt, chosen, rejected = (ids.size for ids in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids))
    return prompt**2 / 2 + sum(length * (prompt + length / 2) for length in (chosen, rejected))


def amounts(pairs: Sequence[Pair], batch: int) -> dict[str, float]:
    """Number of pairs, and means: tokens of prompt, response, packed and padded pair; positions attended to."""
    parts = [pairs[i : i + batch] for i in range(0, len(pairs) - batch + 1, batch)]
    return {
        "pairs": len(pairs),
        "prompt": float(np.mean([pair.prompt_ids.size for pair in pairs])),
        "response": float(np.mean([(pair.chosen_ids.size + pair.rejected_ids.size) / 2 for pair in pairs])),
        "packed": float(np.mean([size(pair) for pair in pairs])),
        "attended": float(np.mean([attended(pair) for pair in pairs])),
        "padded": float(np.mean([padded(part) / batch for part in parts])),
    }
