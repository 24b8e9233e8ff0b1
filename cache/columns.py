"""Rows to Arrow columns and back.

In: `CachedPair` rows, or an Arrow table of `arrow_schema`. Out: the table, or rows that are views of it, not copies.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from .schema import (
    SIDES,
    TOKEN_COLUMNS,
    CachedPair,
    Float32,
    Int32,
    Pair,
    ReferenceResponse,
    SparseFeatures,
    arrow_schema,
    feature_column,
)


def rows_to_table(rows: Sequence[CachedPair], widths: Sequence[int]) -> pa.Table:
    """Lays rows out as the columns of `arrow_schema(widths)`.

    Raises:
        ValueError: a row has the wrong number of sites, values that are not float32, or a number that overflows its
            column.
    """
    schema = arrow_schema(widths)
    columns = [pa.array([row.pair.pair_id for row in rows], pa.string())]
    for name in TOKEN_COLUMNS:
        columns.append(_list_array([getattr(row.pair, name) for row in rows], schema.field(name).type))
    for side in SIDES:
        answers: list[ReferenceResponse] = [getattr(row, side) for row in rows]
        for row, answer in zip(rows, answers, strict=True):
            if len(answer.features) != len(widths):
                found = len(answer.features)
                raise ValueError(f"{row.pair.pair_id}, {side}: expected features of {len(widths)} sites, found {found}")
        learnt = f"{side}_learnt"
        columns.append(_list_array([getattr(row.pair, learnt) for row in rows], schema.field(learnt).type))
        columns.append(pa.array([answer.logp for answer in answers], pa.float64()))
        columns.append(pa.array([answer.num_tokens for answer in answers], pa.int32()))
        for site in range(len(widths)):
            kind = schema.field(feature_column(side, site)).type
            columns.append(_feature_array([answer.features[site] for answer in answers], kind))
    return pa.Table.from_arrays(columns, schema=schema)


def _feature_array(features: list[SparseFeatures], kind: pa.StructType) -> pa.StructArray:
    for entry in features:
        if entry.values.dtype != np.float32:
            raise ValueError(f"values of features: expected float32, found {entry.values.dtype}")
    arrays = [
        _list_array([entry.ids for entry in features], kind.field("ids").type),
        _list_array([entry.values for entry in features], kind.field("values").type),
        pa.array([entry.floor for entry in features], pa.float32()),
        pa.array([entry.nnz for entry in features], pa.int32()),
    ]
    return pa.StructArray.from_arrays(arrays, fields=list(kind))


def _list_array(lists: Sequence[npt.NDArray[Any]], kind: pa.ListType) -> pa.ListArray:
    offsets = np.zeros(len(lists) + 1, dtype=np.int64)
    np.cumsum([len(items) for items in lists], out=offsets[1:])
    items = np.concatenate(lists) if lists else np.empty(0, dtype=np.uint8)
    # Arrow's cast raises on overflow; numpy's wraps.
    values = pa.array(items).cast(kind.value_type)
    return pa.ListArray.from_arrays(pa.array(offsets).cast(pa.int32()), values, type=kind)


class Lists:
    """A list column of N rows without nulls: row i is `values[offsets[i]:offsets[i + 1]]`.

    Attributes:
        offsets: int32 [N + 1].
        values: the items of all rows, concatenated.
    """

    def __init__(self, array: pa.ListArray):
        self.offsets: Int32 = array.offsets.to_numpy()
        self.values: npt.NDArray[Any] = array.values.to_numpy()
        # A memoryview gives Python numbers, several times faster than numpy gives its own.
        self._bounds = memoryview(self.offsets)

    def row(self, i: int) -> npt.NDArray[Any]:
        """The items of row i, as a view."""
        return self.values[self._bounds[i] : self._bounds[i + 1]]

    def largest(self) -> tuple[int, int]:
        """The row of the largest item, and that item; (0, -1) where there is none."""
        start, stop = int(self.offsets[0]), int(self.offsets[-1])
        if start == stop:
            return 0, -1
        place = start + int(np.argmax(self.values[start:stop]))
        return int(np.searchsorted(self.offsets, place, side="right")) - 1, int(self.values[place])


class FeatureColumn:
    """The `SparseFeatures` of one side at one site as columns of N rows; `floor` is float32 [N], `nnz` int32 [N]."""

    def __init__(self, array: pa.StructArray):
        # flatten() respects the offset of a sliced array; field() does not.
        ids, values, floor, nnz = array.flatten()
        self.ids, self.values = Lists(ids), Lists(values)
        self.floor: Float32 = floor.to_numpy()
        self.nnz: Int32 = nnz.to_numpy()
        self._floor, self._nnz = memoryview(self.floor), memoryview(self.nnz)

    def row(self, i: int) -> SparseFeatures:
        """The features of row i, as views."""
        return SparseFeatures(self.ids.row(i), self.values.row(i), self._floor[i], self._nnz[i])


class AnswerColumns:
    """The `ReferenceResponse` of one side, and its learnt spans, as columns of N rows.

    Attributes:
        learnt: lists of start and stop positions.
        logp: float64 [N].
        num_tokens: int32 [N].
        features: one entry per site.
    """

    def __init__(self, batch: pa.RecordBatch, side: str, sites: Sequence[int]):
        self.learnt = Lists(batch.column(f"{side}_learnt"))
        self.logp: npt.NDArray[np.float64] = batch.column(f"{side}_ref_logp").to_numpy()
        self.num_tokens: Int32 = batch.column(f"{side}_num_tokens").to_numpy()
        self.features = [FeatureColumn(batch.column(feature_column(side, site))) for site in sites]
        self._logp, self._num_tokens = memoryview(self.logp), memoryview(self.num_tokens)

    def row(self, i: int) -> ReferenceResponse:
        """The answer of row i, its arrays as views."""
        return ReferenceResponse(self._logp[i], self._num_tokens[i], tuple([f.row(i) for f in self.features]))


class Columns:
    """A record batch of N rows without nulls as numpy arrays that share its memory.

    Attributes:
        pair_ids: Arrow strings [N].
        prompt, chosen, rejected: lists of token ids.
        answers: the chosen side and the rejected side.
    """

    def __init__(self, batch: pa.RecordBatch, sites: Sequence[int]):
        self.pair_ids = batch.column("pair_id")
        self.prompt, self.chosen, self.rejected = (Lists(batch.column(name)) for name in TOKEN_COLUMNS)
        self.answers = tuple(AnswerColumns(batch, side, sites) for side in SIDES)

    def row(self, i: int) -> CachedPair:
        """Row i; its arrays are views, writable where the batch's memory is."""
        chosen, rejected = self.answers
        tokens = (self.prompt.row(i), self.chosen.row(i), self.rejected.row(i))
        pair = Pair(self.pair_ids[i].as_py(), *tokens, chosen.learnt.row(i), rejected.learnt.row(i))
        return CachedPair(pair, chosen.row(i), rejected.row(i))


def table_to_batch(table: pa.Table) -> pa.RecordBatch:
    """The table as one record batch, without metadata."""
    schema = table.schema.remove_metadata()
    return pa.RecordBatch.from_arrays([column.combine_chunks() for column in table.columns], schema=schema)
