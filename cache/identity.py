"""The identity of a cache: what it means and how it was computed.

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
    """Two caches, or a cache and a run, were made from different specs."""


class FormatError(UserError):
    """A cache is of another version of the layout on disk."""

    def __init__(self, where: str, found: int) -> None:
        """Says what to do about version `found`."""
        super().__init__(
            f"{where}: expected format version {FORMAT_VERSION}, found {found}; another version of fpo made this "
            "cache: make it again in a new folder by `fpo precompute`, or go on with that version"
        )


@dataclass(frozen=True)
class SiteMeaning:
    """One site and the SAE that reads it.

    Attributes:
        site: the activation's name, as `blocks.25.hook_resid_post`.
        sae: SHA-256 of the SAE's weights and of the settings that its features depend on.
        width: the number of the SAE's features.
        architecture: the SAE's kind, as `jumprelu`.
    """

    __pydantic_config__ = STRICT

    site: str
    sae: str
    width: int
    architecture: str


@dataclass(frozen=True)
class Meaning:
    """What the numbers of a cache mean; every field is part of the fingerprint.

    Attributes:
        format_version: of the layout on disk.
        model: SHA-256 of the reference model's weight files and configuration.
        tokenizer: SHA-256 of the tokenizer's pipeline and special tokens.
        chat_template: its full text.
        date: the day that it is to the template, as YYYY-MM-DD; None where the template does not read the clock.
        sites: in the order of the feature columns.
        recipe: the arithmetic, `fp32` or `bf16`.
        pooling: how features are pooled over a response.
        keep_features: how many features are kept per response; None for all above 0.
        max_length: prompt and response together, tokens.
        max_prompt_length: tokens.
        truncation: the rule by which longer ones are cut.
        skip_rules: the reasons for which a pair is skipped.
        drop_ties: whether pairs of equal score are skipped.
        turns: which assistant turns of a response of several are learnt, `all` or the `last`.
        dataset: SHA-256 of the data set's content.
        split: its name, letters, digits, `_` and `.`.
        limit: how many raw rows were taken; None for all.
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
        """The same on the day of the first of the others, if the template reads the clock."""
        if self.date is None:
            return self
        begun = next((other.date for other in others if other.date is not None), self.date)
        return dataclasses.replace(self, date=begun)

    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, of the canonical JSON of all fields."""
        return sha256_text(canonical_json(dataclasses.asdict(self)))


@dataclass(frozen=True)
class Numerics:
    """What may move the last bits of the numbers, not what they mean.

    Attributes:
        attention: the attention implementation.
        token_budget: tokens of a packed row.
        shard_size: raw rows of a shard.
        device: the device's kind and name.
        threads: CPU threads.
        versions: of the libraries, by name.
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
    # The hash tells two long values apart whose beginnings are equal.
    return text if len(text) <= 80 else f"{text[:40]}… ({len(text)} characters, SHA-256 {sha256_text(text)[:8]})"
