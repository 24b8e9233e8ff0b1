"""Preference data to examples.

In: a hub id with configuration and split, or a local file or folder, in any accepted shape. Out: `Example`s that no
longer know the shape they were stored in, and a hash of their content. Where rows come from is in raw_rows.py, what
they say in shapes.py. What makes tokens of them (`chat.py`, `tokenized.py`) is named here too, so that one import
serves all.
"""

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from ...cache.errors import UserError
from .chat import Example, Text
from .raw_rows import RawRows, load_rows
from .shapes import Read, Row, check_readable, read_pair, shape_of


class Preferences:
    """Preference examples of one split, in the order of the raw rows.

    Attributes:
        source: the hub id or path it was loaded from.
        split: the split's name, as it was asked for.
    """

    def __init__(self, rows: RawRows | Sequence[Row], *, source: str, split: str) -> None:
        """Takes rows as dicts; `load_preferences` makes one of a file, a folder or the hub's data."""
        self._rows = rows
        self._columns = (
            rows.columns if isinstance(rows, RawRows) else dict.fromkeys(name for row in rows for name in row)
        )
        self.source = source
        self.split = split

    def __len__(self) -> int:
        return len(self._rows)

    def example(self, i: int) -> Example:
        """The example in raw row `i`.

        Raises:
            UserError: the row has a value of a wrong type or an unknown shape; the message has the row's number.
        """
        return self._read(i).example

    @property
    def content_hash(self) -> str:
        """SHA-256 over all examples, scores included: independent of file format, shape and unused columns."""
        return self._survey[0]

    @property
    def guessed_prompts(self) -> int:
        """How many prompts are but the common beginning of both texts: no column held one."""
        return self._survey[1]

    @cached_property
    def _survey(self) -> tuple[str, int]:
        digest, guessed = hashlib.sha256(), 0
        for i in range(len(self)):
            e, was_guessed = self._read(i)
            texts = [_plain(text) for text in (e.prompt, e.chosen, e.rejected)]
            content = [*texts, e.score_chosen, e.score_rejected, *([list(e.tools)] if e.tools else [])]
            digest.update(json.dumps(content).encode() + b"\n")
            guessed += was_guessed
        return digest.hexdigest(), guessed

    def _read(self, i: int) -> Read:
        try:
            return read_pair(self._rows[i], self._columns)
        except (UserError, RecursionError) as error:
            raise UserError(f"{self.source}, row {i} of split {self.split!r}: {error}") from error


def load_preferences(
    source: str,
    *,
    split: str,
    config: str | None = None,
    limit: int | None = None,
    renames: Sequence[str] = (),
) -> Preferences:
    """Opens preference data.

    A local file is the split, whatever its name. In a folder the split is the sub-folder `<split>/`, or
    `data/<split>-*`, or the files whose names begin with it; or what `save_to_disk` wrote.

    Args:
        source: a local file or folder, or else a hub id.
        split: the name of the split.
        config: the hub data set's configuration; local data has none.
        limit: keep only the first so many raw rows.
        renames: `NEW=OLD`: the column OLD is called NEW.

    Raises:
        UserError: no such file, folder, hub data set or split, a file of another kind, a missing column, or a setting
            that would be ignored.
    """
    rows = load_rows(source, split, config, limit, renames=renames)
    try:
        shape_of(rows.columns)
        check_readable(rows.columns)
    except ValueError as error:
        raise UserError(f"{source}: {error}") from error
    return Preferences(rows, source=source, split=split)


def _plain(text: Text) -> Any:
    if isinstance(text, str):
        return text
    return [[message.role, message.content, *([message.more] if message.more else [])] for message in text]
