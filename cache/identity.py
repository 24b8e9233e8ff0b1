"""The identity of a cache: what its numbers mean, and what may move their last bits.

In: hashes, names and settings. Out: a fingerprint, and the fields in which two identities differ.
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .errors import UserError
from .files import STRICT, canonical_json, sha256_text
from .schema import FORMAT_VERSION


class IdentityError(UserError):
    """A folder or store holds a cache whose identity is not the expected one."""


class FormatError(UserError):
    """A cache has another version of the format on disk."""

    def __init__(self, where: str, found: int) -> None:
        """`where` is the file that states version `found`."""
        super().__init__(
            f"{where}: expected format version {FORMAT_VERSION}, found {found}; another version of fpo made this "
            "cache: make it again in a new folder with `fpo precompute`, or use that version"
        )


@dataclass(frozen=True)
class SiteMeaning:
    """One site and the SAE that reads it.

    Attributes:
        site: the name of the hook, such as `blocks.25.hook_resid_post`.
        sae: SHA-256 of the SAE's weights and of the settings that its features depend on.
        width: the number of the SAE's features.
        architecture: of the SAE, such as `jumprelu`.
    """

    __pydantic_config__ = STRICT

    site: str
    sae: str
    width: int
    architecture: str


@dataclass(frozen=True)
class Meaning:
    """What the numbers of a cache mean; the fingerprint covers every field.

    Attributes:
        format_version: version of the format on disk.
        model: SHA-256 of the reference model's weight files and configuration.
        tokenizer: SHA-256 of the tokenizer's pipeline and special tokens.
        chat_template: its full text.
        date: the day that the template is told, YYYY-MM-DD; None if the template does not ask for the date.
        sites: in the order of the feature columns.
        recipe: the arithmetic, `fp32` or `bf16`.
        pooling: how features are pooled over a response.
        keep_features: how many features are kept per response and site; None for all above 0.
        max_length: most tokens of prompt and response together.
        max_prompt_length: most tokens of a prompt.
        truncation: the rule that cuts what is longer.
        skip_rules: the reasons for skipping a pair.
        drop_ties: whether pairs of equal score are skipped.
        turns: which assistant turns of a multi-turn response are learnt, `all` or `last`.
        dataset: SHA-256 of the data set's content.
        split: name of the split; letters, digits, `_` and inner `.`.
        limit: the number of raw rows taken; None for all.
        order: the order of raw rows.
    """

    __pydantic_config__ = STRICT

    format_version: int
    model: str
    tokenizer: str
    chat_template: str
    date: str | None
    sites: tuple[SiteMeaning, ...]
    recipe: str
    pooling: str
    keep_features: int | None
    max_length: int
    max_prompt_length: int
    truncation: str
    skip_rules: tuple[str, ...]
    drop_ties: bool
    turns: str
    dataset: str
    split: str
    limit: int | None
    order: str

    @property
    def widths(self) -> list[int]:
        """The SAE width of every site."""
        return [site.width for site in self.sites]

    def dated_as(self, others: Iterable["Meaning"]) -> "Meaning":
        """The same meaning with the first date that the others have, if the template asks for the date."""
        if self.date is None:
            return self
        begun = next((other.date for other in others if other.date is not None), self.date)
        return dataclasses.replace(self, date=begun)

    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, of the canonical JSON of all fields."""
        return sha256_text(canonical_json(dataclasses.asdict(self)))


@dataclass(frozen=True)
class Numerics:
    """What may move the last bits of the numbers but does not change what they mean.

    Attributes:
        attention: the attention implementation.
        token_budget: most tokens in a packed row.
        shard_size: raw rows per shard.
        device: the device's kind and name.
        threads: number of CPU threads.
        versions: version of each library, by name.
    """

    __pydantic_config__ = STRICT

    attention: str
    token_budget: int
    shard_size: int
    device: str
    threads: int
    versions: dict[str, str]


def differences(expected: Meaning | Numerics, found: Meaning | Numerics) -> list[str]:
    """The fields in which two identities differ, one line each with both values."""
    left, right = (dict(_leaves(dataclasses.asdict(identity))) for identity in (expected, found))
    return [
        f"{name}: expected {_short(left, name)}, found {_short(right, name)}"
        for name in dict.fromkeys([*left, *right])
        if name not in left or name not in right or left[name] != right[name]
    ]


def _leaves(value: Any, name: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        prefix = f"{name}." if name else ""
        return [leaf for key, item in value.items() for leaf in _leaves(item, f"{prefix}{key}")]
    if isinstance(value, tuple) and any(isinstance(item, dict) for item in value):
        return [leaf for i, item in enumerate(value) for leaf in _leaves(item, f"{name}[{i}]")]
    return [(name, value)]


def _short(leaves: dict[str, Any], name: str) -> str:
    if name not in leaves:
        return "nothing"
    text = repr(leaves[name])
    # The hash distinguishes two long values that begin alike.
    return text if len(text) <= 80 else f"{text[:40]}… ({len(text)} characters, SHA-256 {sha256_text(text)[:8]})"
