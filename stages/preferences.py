"""Preference data to examples.

In: a hub id with configuration and split, or a local Parquet, JSON or JSONL file or folder, in any accepted shape.
Out: `Example`s that no longer know the shape they were stored in, and a hash of their content. What makes tokens of
them (`chat.py`, `tokenized.py`) is named here too, so that one import serves all.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
from datasets.utils.extract import Extractor

from .chat import GEMMA_TURNS, ChatFormat, Example, Message, Text, Turns, load_template
from .reading import reading
from .tokenized import SKIP_REASONS, Limits, Tokenized, tokenize_pair

__all__ = [
    "GEMMA_TURNS",
    "SKIP_REASONS",
    "ChatFormat",
    "Example",
    "Limits",
    "Message",
    "Preferences",
    "Tokenized",
    "load_preferences",
    "load_template",
    "tokenize_pair",
]

BUILDERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json"}
SHAPES = (
    "'chosen' and 'rejected' as message lists (alone, or with 'prompt' as text or messages), as Human/Assistant "
    "dialogue strings, or as plain text (alone, or with 'prompt' as text)"
)


class Preferences:
    """Preference examples of one split, in the order of the raw rows.

    Attributes:
        source: the hub id or path it was loaded from.
        split: the split's name, as it was asked for.
    """

    def __init__(self, rows: Any, *, source: str, split: str) -> None:
        """Takes a `datasets.Dataset`, or any sequence of rows as dicts; `load_preferences` makes one."""
        self._rows = rows
        self.source = source
        self.split = split

    def __len__(self) -> int:
        return len(self._rows)

    def example(self, i: int) -> Example:
        """The example in raw row `i`.

        Raises:
            ValueError: the row has a value of a wrong type or an unknown shape; the message has the row's number.
        """
        try:
            return _normalise(self._rows[i])
        except ValueError as error:
            raise ValueError(f"{self.source}, row {i} of split {self.split!r}: {error}") from error

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 over all examples, scores included: independent of file format, shape and unused columns."""
        digest = hashlib.sha256()
        for i in range(len(self)):
            e = self.example(i)
            texts = [_plain(text) for text in (e.prompt, e.chosen, e.rejected)]
            digest.update(json.dumps([*texts, e.score_chosen, e.score_rejected]).encode() + b"\n")
        return digest.hexdigest()


def load_preferences(source: str, *, split: str, config: str | None = None, limit: int | None = None) -> Preferences:
    """Opens preference data.

    A local file is the split, whatever its name. In a folder the split is the sub-folder `<split>/`, or
    `data/<split>-*`, or the files whose names begin with it.

    Args:
        source: a local file or folder, or else a hub id.
        split: the name of the split.
        config: the hub data set's configuration; local data has none.
        limit: keep only the first so many raw rows.

    Raises:
        FileNotFoundError: there is no such file, folder or hub data set.
        ValueError: no such split, a file of another kind, a missing column, or a setting that would be ignored.
    """
    rows = load_rows(source, split, config, limit)
    if not {"chosen", "rejected"} <= set(rows.column_names):
        raise ValueError(f"{source}: found columns {', '.join(map(repr, rows.column_names))}, expected {SHAPES}")
    return Preferences(rows, source=source, split=split)


def load_rows(
    source: str, split: str, config: str | None, limit: int | None, what: str = "preference data"
) -> datasets.Dataset:
    """The raw rows of a split, whatever their columns; `what` they are is said where there are none, else as above."""
    if limit is not None and limit < 1:
        raise ValueError(f"expected a limit of at least 1 row, found {limit}")
    rows = _open_rows(source, split, config, what)
    return rows if limit is None else rows.select(range(min(limit, len(rows))))


def _open_rows(source: str, split: str, config: str | None, what: str) -> Any:
    path = Path(source).expanduser()
    if not path.exists():
        if path.suffix in BUILDERS or source.startswith(("/", "./", "../", "~")) or source.count("/") > 1:
            raise FileNotFoundError(f"expected {what} at {source}, found no such file or folder")
        try:
            return datasets.load_dataset(source, config, split=split)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"found no local file or folder and no hub data set {source!r}") from error
        except ValueError as error:  # an unknown split or configuration: the library's message, on one line
            raise ValueError(f"hub data set {source!r}: {' '.join(str(error).split())}") from error
    if config is not None:
        raise ValueError(f"{source} is local and has no configurations, found {config!r}; leave it out")
    files = _split_files(path, split) if path.is_dir() else [path]
    builders = {BUILDERS.get(file.suffix) for file in files}
    if len(builders) > 1 or None in builders:
        names = ", ".join(file.name for file in files)
        raise ValueError(f"expected files of one kind among {', '.join(BUILDERS)} for split {split!r}, found {names}")
    with reading(f"{source}: not readable as one table"):
        for file in files:
            _check_rows(file)
        return datasets.load_dataset(builders.pop(), data_files=[str(file) for file in files], split="train")


def _check_rows(path: Path) -> None:
    """Refuses what is packed, a file without rows, and `null` in place of one, which ends the process in pyarrow."""
    if packed := Extractor.infer_extractor_format(path):  # `datasets` would unpack it, whatever comes of it
        raise ValueError(f"expected {path.name} as it is, found it packed ({packed}); unpack it")
    if path.suffix == ".parquet" and path.stat().st_size:
        count = pq.read_metadata(path).num_rows
    else:
        nulls = list(_nulls(path))
        if any(nulls):
            raise ValueError(f"expected objects, found null in place of row {nulls.index(True)} of {path.name}")
        count = len(nulls)
    if not count:
        raise ValueError(f"expected rows in every file, found {path.name} empty")


def _nulls(path: Path) -> Iterator[bool]:
    """For every row of a JSON file whether it is `null`."""
    with path.open("rb") as file:
        if file.read(1) == b"[":
            yield from (row is None for row in json.loads(b"[" + file.read()))
        else:
            file.seek(0)
            yield from (line.startswith(b"null") for raw in file if (line := raw.strip(b"\xef\xbb\xbf \t\r\n")))


def _split_files(folder: Path, split: str) -> list[Path]:
    """The data files of a split, sorted by name; the first layout that has any counts."""
    files = sorted(f for f in folder.rglob("*") if f.suffix in BUILDERS and f.is_file())
    for parent, prefix in ((folder / split, ""), (folder / "data", f"{split}-"), (folder, split)):
        # Shards of one split differ in their number alone: `train_sft` and `train_prefs` are not one `train`.
        named: dict[str, list[Path]] = {}
        for file in files:
            if file.parent == parent and file.name.startswith(prefix):
                stem = re.sub(r"[-_]?\d+(-of-\d+)?$", "", file.stem) if prefix else split
                named.setdefault(stem, []).append(file)
        if split in named or len(named) == 1:
            return named[split] if split in named else next(iter(named.values()))
    found = ", ".join(str(file.relative_to(folder)) for file in files) or "no Parquet, JSON or JSONL file"
    raise ValueError(f"{folder}: expected files of one split {split!r}, found {found}")


def _plain(text: Text) -> str | list[list[str]]:
    return text if isinstance(text, str) else [[message.role, message.content] for message in text]


def _normalise(row: dict[str, Any]) -> Example:
    """A raw row of any accepted shape as an `Example`; null counts as empty."""
    prompt, chosen, rejected = (read_text(row.get(name), name) for name in ("prompt", "chosen", "rejected"))
    scores = _score(row, "score_chosen"), _score(row, "score_rejected")
    if isinstance(prompt, str) and isinstance(chosen, str) and isinstance(rejected, str):
        return Example(*_split_texts(prompt, chosen, rejected), *scores)
    if any(isinstance(side, str) and side for side in (chosen, rejected)):
        raise ValueError(f"found text beside message lists; accepted are {SHAPES}")
    sides = [side if isinstance(side, tuple) else () for side in (chosen, rejected)]
    turns: Turns = ()  # of the prompt, where the lists do not carry them
    if isinstance(prompt, tuple):
        turns = prompt
    elif prompt.strip() and all(message.role == "assistant" for side in sides for message in side):
        turns = (Message("user", prompt),)
    full = [side if side[: len(turns)] == turns else turns + side for side in sides]
    return Example(*_split_turns(full[0], full[1]), *scores)


def read_text(value: Any, name: str) -> Text:
    """The text or the turns in column `name`; null counts as empty text.

    Raises:
        ValueError: it is neither.
    """
    if value is None or isinstance(value, str):
        return value or ""
    if not isinstance(value, list):
        raise ValueError(f"expected text or messages in {name!r}, found {type(value).__name__}")
    for message in value:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise ValueError(f"expected messages with 'role' and 'content' as text in {name!r}, found {message!r:.80}")
    return tuple(Message(message["role"], message["content"]) for message in value)


def _score(row: dict[str, Any], name: str) -> float | None:
    value = row.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"expected a finite number or null in {name!r}, found {value!r:.80}")
    return float(value)


def _split_turns(chosen: Turns, rejected: Turns) -> tuple[Turns, Turns, Turns]:
    """Shared turns, and what follows them on either side."""
    shorter, longer = sorted((chosen, rejected), key=len)
    if longer[: len(shorter)] == shorter:
        # One side is the other's beginning, or equal to it: what can differ is the last answer alone.
        shared = len(longer) - (bool(longer) and longer[-1].role == "assistant")
    else:
        shared = next(i for i in range(len(shorter)) if chosen[i] != rejected[i])
    return longer[:shared], chosen[shared:], rejected[shared:]


def _split_texts(prompt: str, chosen: str, rejected: str) -> tuple[Text, Text, Text]:
    sides = [side for side in (chosen, rejected) if side]
    if sides and all(map(_is_dialogue, sides)):
        return _split_turns(_parse_dialogue(chosen), _parse_dialogue(rejected))
    if _is_dialogue(prompt):
        turns = _parse_dialogue(prompt)
        opened = turns[-1] == Message("assistant", "")
        answers = [(Message("assistant", side.strip()),) for side in (chosen, rejected)]
        return turns[:-1] if opened else turns, answers[0], answers[1]
    if prompt or chosen == rejected:
        return prompt, chosen, rejected
    shorter = min(len(chosen), len(rejected))
    # As TRL does: the longest common beginning, and a space at its end belongs to the responses.
    shared = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), shorter)
    if 0 < shared < shorter and chosen[shared - 1] == " ":
        shared -= 1
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _is_dialogue(text: str) -> bool:
    """Whether a text is an Anthropic-HH dialogue."""
    return text.lstrip().startswith("Human:") and "\n\nAssistant:" in text


def _parse_dialogue(text: str) -> Turns:
    """The turns of an Anthropic-HH dialogue, in the roles' usual names; contents lose white space at both ends."""
    roles = {"Human": "user", "Assistant": "assistant"}
    _, *parts = re.split(r"(?:^\s*|\n\n)(Human|Assistant):", text)
    return tuple(Message(roles[name], content.strip()) for name, content in zip(parts[::2], parts[1::2], strict=True))
