"""How far a command is: pairs or answers done, tokens per second, time left.

In: counts of pairs and tokens as they are scored. Out: a bar on a terminal, or a line every half minute in a log file.
"""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console(highlight=False, markup=False, soft_wrap=True)

SECONDS_BETWEEN_LINES = 30.0


class PairProgress:
    """Shows progress over `total` raw rows (or answers) while it is entered; `advance` moves it."""

    def __init__(self, total: int, task: str = "precompute", unit: str = "pairs", *, tokens: bool = True) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(f"{unit}  {{task.fields[rate]:>7}} tokens/s" if tokens else unit),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self._task = self._bar.add_task(task, total=total, rate="-")
        self._unit, self._counts_tokens = unit, tokens
        self._total, self._done, self._scored, self._tokens = total, 0, 0, 0
        self._started = self._last_line = time.monotonic()

    def __enter__(self) -> Self:
        self._bar.start()
        self._started = self._last_line = time.monotonic()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.stop()

    @property
    def tokens_per_second(self) -> float:
        """Tokens scored since it was entered, over the time."""
        return self._tokens / max(1e-9, time.monotonic() - self._started)

    def advance(self, rows: int, tokens: int = 0) -> None:
        """Counts raw rows that are done, and the tokens that were scored for them (0 for rows of finished shards)."""
        self._done += rows
        self._tokens += tokens
        self._scored += rows if tokens or not self._counts_tokens else 0
        rate = f"{self.tokens_per_second:.0f}" if self._tokens else "-"
        self._bar.update(self._task, advance=rows, rate=rate)
        now = time.monotonic()
        if not console.is_terminal and self._scored and now - self._last_line > SECONDS_BETWEEN_LINES:
            self._last_line = now
            left = (self._total - self._done) * (now - self._started) / self._scored
            speed = f" {rate} tokens/s," if self._counts_tokens else ""
            console.print(f"{self._done}/{self._total} {self._unit},{speed} {left / 60:.0f} min left")
