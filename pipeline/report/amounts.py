"""How much data a step goes over: rows and mean lengths, measured where they can be, else assumed and said to be.

In: a step's configuration. Out: a `Data`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ...cache.manifest import Manifest
from ...cache.shard import read_columns
from ...stages.data.chat import Text
from ...stages.data.preferences import Preferences
from ...stages.data.raw_rows import RawRows, load_rows
from ...stages.data.shapes import read_conversation
from ..config import RunConfig
from .jobs import Step

# Rows of hub data sets, from their pages.
ROWS = {
    ("HuggingFaceH4/ultrafeedback_binarized", "train_prefs"): 61_135,
    ("HuggingFaceH4/ultrafeedback_binarized", "test_prefs"): 2_000,
    ("HuggingFaceH4/ultrachat_200k", "train_sft"): 207_865,
    ("HuggingFaceH4/ultrachat_200k", "test_sft"): 23_110,
}
ASSUMED_ROWS = 50_000

# Mean tokens, assumed: of UltraFeedback's prompts and responses; of UltraChat's conversations (6.7 kB a row), of which
# the assistant says most.
PAIR_TOKENS = (185.0, 330.0)
CONVERSATION_TOKENS = (240.0, 960.0)

# Of local data the first rows are measured in characters.
SAMPLED_ROWS = 256
CHARACTERS_A_TOKEN = 4.0


@dataclass(frozen=True)
class Data:
    """Pairs or conversations, of a mean length.

    Attributes:
        count: how many.
        prompt: tokens that nothing is predicted for (of a pair, its prompt).
        response: tokens that are predicted, of each side.
        sides: responses: 2 of a pair, 1 of a conversation.
        origin: where the figures come from.
    """

    count: float
    prompt: float
    response: float
    sides: int
    origin: str

    @property
    def tokens(self) -> float:
        """Tokens of one, its prompt counted once."""
        return self.prompt + self.answered

    @property
    def answered(self) -> float:
        """Predicted tokens of one."""
        return self.sides * self.response

    @property
    def attended(self) -> float:
        """Positions attended to by the tokens of one: P²/2 + sides · (R·P + R²/2)."""
        return self.prompt**2 / 2 + self.sides * self.response * (self.prompt + self.response / 2)

    def within(self, max_length: int, max_prompt_length: int) -> "Data":
        """Cut to these lengths, as `Limits` does."""
        if self.sides == 1:
            share = min(1.0, max_length / self.tokens)
            return replace(self, prompt=self.prompt * share, response=self.response * share)
        prompt = min(self.prompt, max_prompt_length, max_length - 1)
        return replace(self, prompt=prompt, response=min(self.response, max_length - prompt))


def data_of(step: Step, makers: Mapping[Path, Step]) -> Data:
    """What a step reads once, whether or not it is there yet.

    Args:
        step: the step; of one that reads a cache, the pairs of that cache.
        makers: the steps by the folder that they write.

    Raises:
        FileNotFoundError: if it reads a cache or local data that is not there and that no step writes.
        ValueError: if local data cannot be read.
    """
    config = step.config
    if step.command in ("align", "evaluate"):
        assert isinstance(config.cache, Path)  # a plan makes its caches itself
        if config.cache in makers and not makers[config.cache].done:
            return data_of(makers[config.cache], makers)
        return _cached(config.cache)
    sides = 1 if step.command == "sft" else 2
    assert config.dataset is not None
    found = _local(config, sides) if Path(config.dataset).expanduser().exists() else _of_the_hub(config, sides)
    return found.within(config.max_length, config.max_prompt_length)


def _cached(cache: Path) -> Data:
    manifest = Manifest.load(cache)
    columns = ["chosen_num_tokens", "rejected_num_tokens"]
    shards = [read_columns(cache / record.name, manifest.meaning, columns) for record in manifest.shards]
    pairs = max(1, manifest.num_pairs)
    response = sum(sum(shard[column].to_pylist()) for shard in shards for column in columns) / pairs / 2
    prompt = manifest.counts["scored_tokens"] / pairs - 2 * response
    return Data(manifest.num_pairs, prompt, response, 2, "measured in the cache")


def _of_the_hub(config: RunConfig, sides: int) -> Data:
    assert config.dataset is not None
    rows = ROWS.get((config.dataset, config.split))
    origin = "lengths assumed" if rows else "rows and lengths assumed"
    count = min(rows or ASSUMED_ROWS, config.limit or rows or ASSUMED_ROWS)
    return Data(count, *(PAIR_TOKENS if sides == 2 else CONVERSATION_TOKENS), sides, origin)


def _local(config: RunConfig, sides: int) -> Data:
    """Rows counted; lengths from the characters of the first of them."""
    assert config.dataset is not None
    what = "preference data" if sides == 2 else "conversations"
    rows = load_rows(config.dataset, config.split, config.dataset_config, config.limit, what, config.map)
    sampled = min(SAMPLED_ROWS, len(rows))
    characters = [0, 0]  # prompt, response
    for number in range(sampled):
        for part, length in enumerate(_conversation(rows, number) if sides == 1 else _pair(rows, number)):
            characters[part] += length
    prompt, response = (part / CHARACTERS_A_TOKEN / sampled for part in characters)
    return Data(len(rows), max(1.0, prompt), max(1.0, response / sides), sides, "lengths from 4 characters a token")


def _pair(rows: RawRows, number: int) -> tuple[int, int]:
    example = Preferences(rows, source="", split="").example(number)
    return _characters(example.prompt), _characters(example.chosen) + _characters(example.rejected)


def _conversation(rows: RawRows, number: int) -> tuple[int, int]:
    turns, _ = read_conversation(rows[number], rows.columns)
    said = [(message.role == "assistant", len(message.content)) for message in turns]
    return sum(size for answer, size in said if not answer), sum(size for answer, size in said if answer)


def _characters(text: Text) -> int:
    return len(text) if isinstance(text, str) else sum(len(message.content) for message in text)
