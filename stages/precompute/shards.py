"""Stage one: the frozen reference and its SAEs over preference data, once, into a cache.

In: a reference model, SAEs, preferences. Out: a folder, or a place in a store, with Parquet shards and their manifest.
A shard is a range of raw rows and the unit of work: it is written whole or not at all, so the stage can be killed at
any moment and run again, and several workers can share a folder.
"""

import dataclasses
import datetime
import functools
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import zip_longest
from pathlib import Path
from typing import Any

from ...cache.manifest import Manifest, ShardReport
from ...cache.remote import open_writer
from ...cache.schema import Pair
from ..data.preferences import Preferences
from ..data.tokenize import Limits, tokenize_pair
from ..model.tokenizer import check_tokens
from ..scoring.measure import measure_pairs
from ..scoring.packing import PackedRow
from ..scoring.parity import check_packings, difference
from ..scoring.supported import freeze
from .reference import Reference, describe_meaning, describe_numerics, provenance

# One pair for so many, and at least two a shard, are measured a second time in another packing, for the cache's noise.
PAIRS_PER_SAMPLE = 256
ALONE, TOGETHER = 1, 2**62  # token budgets

# The pairs of a shard; its skipped raw rows, each with the reason; counts.
TokenizedShard = tuple[list[Pair], list[tuple[int, str]], Counter[str]]


class ShardWorker:
    """Writes the shard of a given number, unless it is there; any number of workers may share a folder.

    Attributes:
        writer: writes the cache.
    """

    def __init__(
        self,
        reference: Reference,
        preferences: Preferences,
        limits: Limits,
        out: Path | str,
        *,
        keep_features: int | None = 512,
        token_budget: int = 2048,
        shard_size: int = 1024,
        limit: int | None = None,
        compiled: bool = False,
        options: str | None = None,
        repair: bool = False,
        keep_date: bool = False,
        on_pairs: Callable[[int, int], None] | None = None,
    ) -> None:
        """Opens the cache's place, which may hold shards of an earlier, interrupted run.

        Args:
            reference: the frozen model and its SAEs.
            preferences: the raw rows.
            limits: lengths and what to drop.
            out: the cache's folder or URL.
            keep_features: features kept a response; None for all that are not 0.
            token_budget: tokens of a packed row.
            shard_size: raw rows of a shard.
            limit: how many raw rows were asked for, for the fingerprint; None for all.
            compiled: whether the model's layers are compiled.
            options: the text of `run.yaml`; None for no such file.
            repair: as `open_writer`'s.
            keep_date: whether a template that reads the clock is to show the day on which the cache was begun, if it
                was, in place of the reference's.
            on_pairs: called with (raw rows, scored tokens) after each piece of work, (rows, 0) for a finished shard.

        Raises:
            UserError: if the folder holds another cache (`IdentityError`), or the model is not supported.
        """
        freeze(reference.model, reference.recipe, compiled=compiled, sites=[sae.site for sae in reference.saes])
        meaning = describe_meaning(reference, preferences, limits, keep_features=keep_features, limit=limit)
        numerics = describe_numerics(reference.model, token_budget, shard_size)
        self.writer = open_writer(out, meaning, numerics, len(preferences), repair=repair, keep_date=keep_date)
        if (begun := self.writer.spec.meaning.date) != meaning.date:
            assert begun is not None, "whether the template reads the clock is the template's"
            reference = dataclasses.replace(reference, chat=reference.chat.on(datetime.date.fromisoformat(begun)))
        if options is not None:
            self.writer.write_options(options)
        self._reference, self._preferences, self._limits = reference, preferences, limits
        self._advance = on_pairs or (lambda rows, tokens: None)
        self._started, self._tokens, self._written = time.monotonic(), 0, 0
        self._thread, self._ahead = ThreadPoolExecutor(1, "tokenize"), dict[int, Future[TokenizedShard]]()

    def work(self, index: int, following: int | None = None) -> bool:
        """Writes a shard, unless it is done or another worker's.

        Args:
            index: the shard's number.
            following: the next shard's number, whose pairs are tokenised while this one's are measured.

        Returns:
            Whether it is done; False while another worker is at it.

        Raises:
            FloatingPointError: if a log-probability or a feature is not finite; names the pair and the site.
            UserError: if two packings differ by more than rounding explains (`check_packings`).
        """
        if self.writer.is_done(index):
            self._advance(len(self.writer.spec.shard_range(index)), 0)
            return True
        with self.writer.lock(index) as mine:
            if mine:
                self._tokens += self._write_shard(index, following).counts["scored_tokens"]
                self._written += 1
        return mine or self.writer.is_done(index)

    def _tokenized(self, index: int) -> Future[TokenizedShard]:
        """A shard's pairs, tokenised in a thread of its own, which alone reads the data."""
        if index not in self._ahead:
            self._ahead[index] = self._thread.submit(self._tokenize, index)
        return self._ahead[index]

    def _tokenize(self, index: int) -> TokenizedShard:
        pairs, skipped, tokens = [], [], []
        counts: Counter[str] = Counter(ties=0, truncated_prompts=0, truncated_responses=0, scored_tokens=0)
        for raw_row in self.writer.spec.shard_range(index):
            example = self._preferences.example(raw_row)
            tokenized = tokenize_pair(example, raw_row, self._reference.chat, self._limits)
            if tokenized.pair is None:
                assert tokenized.skipped is not None
                skipped.append((raw_row, tokenized.skipped))
                continue
            pair = tokenized.pair
            pairs.append(pair)
            name = f"{self._preferences.source}, row {raw_row}"
            tokens += [(name, ids) for ids in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)]
            counts["ties"] += tokenized.tie
            counts["truncated_prompts"] += tokenized.prompt_truncated
            counts["truncated_responses"] += tokenized.responses_truncated
        check_tokens(self._reference.model, tokens, self._reference.chat.tokenizer)
        return pairs, skipped, counts

    def leave(self) -> None:
        """Says in the cache's `provenance.jsonl` who wrote how many shards since the last time, when and how fast."""
        for future in self._ahead.values():
            future.cancel()
        self._ahead.clear()
        if self._written:
            seconds = time.monotonic() - self._started
            record = provenance(self._reference, self._preferences, self._written, self._tokens, seconds)
            self.writer.append_provenance(record)
        self._started, self._tokens, self._written = time.monotonic(), 0, 0

    def _write_shard(self, index: int, following: int | None) -> ShardReport:
        rows = self.writer.spec.shard_range(index)
        pairs, skipped, counts = self._tokenized(index).result()
        self._ahead.clear()
        if following is not None and not self.writer.is_done(following):
            self._tokenized(following)
        self._advance(len(skipped), 0)

        rows_of_one: set[int] = set()

        def on_row(row: PackedRow) -> None:
            counts["scored_tokens"] += row.tokens
            if len(row.pairs) == 1:
                rows_of_one.update(row.pairs)
            self._advance(len(row.pairs), row.tokens)

        measure = functools.partial(
            measure_pairs,
            self._reference.model,
            saes=self._reference.saes,
            recipe=self._reference.recipe,
            keep_features=self.writer.spec.meaning.keep_features,
        )
        measured = measure(pairs, token_budget=self.writer.spec.numerics.token_budget, on_row=on_row)
        # The sample is the shard's first pairs, so that the noise does not depend on where an earlier run was stopped.
        sample = min(len(pairs), max(2, math.ceil(len(pairs) / PAIRS_PER_SAMPLE)))
        another_packing = TOGETHER if rows_of_one.issuperset(range(sample)) else ALONE
        again = measure(pairs[:sample], token_budget=another_packing)
        if sample:
            check_packings(measured[:sample], again, self._reference.recipe)
        report = ShardReport(
            index=index,
            start=rows.start,
            stop=rows.stop,
            skipped=tuple(skipped),
            counts=dict(counts),
            noise=difference(measured[:sample], again) if sample else None,
        )
        self.writer.write_shard(measured, report)
        return report


def precompute(
    reference: Reference,
    preferences: Preferences,
    limits: Limits,
    out: Path | str,
    *,
    rank: int = 0,
    world_size: int = 1,
    **settings: Any,
) -> Manifest | None:
    """Writes the shards that are missing, then the manifest.

    Several workers share them out: each takes every `world_size`-th, then what the others have not begun.

    Args:
        reference: the frozen model and its SAEs.
        preferences: the raw rows.
        limits: lengths and what to drop.
        out: the cache's folder or URL; may hold shards of an earlier, interrupted run.
        rank: this worker's number, from 0.
        world_size: how many workers there are.
        settings: as `ShardWorker`'s.

    Returns:
        The manifest; None if other workers still hold shards (whoever finishes last writes it).

    Raises:
        UserError: if the folder holds another cache (`IdentityError`), no pair is left to score, or two packings of
            a pair differ by more than rounding explains.
        OSError: if a store does not answer.
        FloatingPointError: if a log-probability or a feature is not finite; names the pair and the site.
    """
    worker = ShardWorker(reference, preferences, limits, out, **settings)
    indices = sorted(range(worker.writer.spec.num_shards), key=lambda index: index % world_size != rank)
    return _write_missing(worker, indices)


def repair(
    reference: Reference,
    preferences: Preferences,
    limits: Limits,
    out: Path | str,
    *,
    on_damage: Callable[[list[str]], None],
    **settings: Any,
) -> tuple[Manifest | None, list[str]]:
    """Reads every byte of a cache and computes the damaged shards again, and no other.

    Killed at any moment, it leaves a cache that says which shards it lacks, and can be run again.

    Args:
        reference: the frozen model and its SAEs.
        preferences: the raw rows.
        limits: lengths and what to drop.
        out: the cache's folder or URL.
        on_damage: called with what was found, a line each, before anything is computed; with none, nothing is written.
        settings: as `ShardWorker`'s.

    Returns:
        The manifest, as `precompute`; the shards that now have other bytes than the manifest vouched for.

    Raises:
        As `precompute`.
    """
    worker = ShardWorker(reference, preferences, limits, out, repair=True, **settings)
    before, damages = worker.writer.published, worker.writer.discard_damage()
    on_damage(damages)
    if not damages:
        return before, []
    manifest = _write_missing(worker, range(worker.writer.spec.num_shards))
    records = zip(before.shards, manifest.shards, strict=True) if before and manifest else ()
    return manifest, [new.name for old, new in records if new != old]


def _write_missing(worker: ShardWorker, indices: Sequence[int]) -> Manifest | None:
    try:
        for index, following in zip_longest(indices, indices[1:]):
            worker.work(index, following)
    finally:
        worker.leave()
    return worker.writer.finish()
