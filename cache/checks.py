"""The rules that every row of a cache obeys.

In: the table of one shard. Out: nothing, or a `ValueError` that names the first row and column that break a rule.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from .columns import Columns, FeatureColumn, Lists, table_to_batch
from .schema import SIDES, TOKEN_COLUMNS, arrow_schema, feature_column, pair_id, raw_row_of

# For each rule of a column: a mask over rows, true where the rule is broken, and what is wrong there.
Faults = Iterator[tuple[npt.NDArray[np.bool_], str]]


def check_table(table: pa.Table, widths: Sequence[int], sites: Sequence[int] | None = None) -> None:
    """Checks columns, types and the content of every row.

    Args:
        table: of the columns `arrow_schema(widths, sites)`.
        widths: the number of SAE features at each site of the cache.
        sites: indices of the sites whose features the table holds; all by default.

    Raises:
        ValueError: a rule is broken; names the first row (by number and pair_id) and the column.
    """
    sites = range(len(widths)) if sites is None else sites
    schema = arrow_schema(widths, sites)
    check_schema(table.schema, widths, sites)
    batch = table_to_batch(table)
    for name in schema.names:
        if _has_nulls(batch.column(name)):
            raise ValueError(f"{name}: holds nulls")
    columns = Columns(batch, sites)
    for name, faults in _faults(columns, widths, sites):
        for broken, rule in faults:
            if broken.any():
                row = int(broken.argmax())
                raise ValueError(f"row {row} ({columns.pair_ids[row].as_py()}), {name}: {rule}")


def check_schema(found: pa.Schema, widths: Sequence[int], sites: Sequence[int] | None = None) -> None:
    """Checks the names, order and types of the columns `arrow_schema(widths, sites)`.

    Raises:
        ValueError: a column is missing, unknown, of another type or in another place.
    """
    schema = arrow_schema(widths, sites)
    if found.names != schema.names:
        raise ValueError(f"columns: expected {schema.names}, found {found.names}")
    if not found.equals(schema):
        expected, other = ({(f.name, str(f.type), f.nullable) for f in s} for s in (schema, found))
        raise ValueError(
            f"columns: expected {sorted(expected - other)}, found {sorted(other - expected)} in their place"
        )


def _has_nulls(array: pa.Array) -> bool:
    if array.null_count:
        return True
    if pa.types.is_struct(array.type):
        return any(_has_nulls(child) for child in array.flatten())
    return bool(pa.types.is_list(array.type) and array.values.null_count)


def _faults(columns: Columns, widths: Sequence[int], sites: Sequence[int]) -> Iterator[tuple[str, Faults]]:
    tokens = (columns.prompt, columns.chosen, columns.rejected)
    for name, lists in zip(TOKEN_COLUMNS, tokens, strict=True):
        yield name, _token_faults(lists)
    yield "pair_id", _pair_id_faults(columns)
    for side, lists, answers in zip(SIDES, tokens[1:], columns.answers, strict=True):
        count, logp = answers.num_tokens, answers.logp
        yield f"{side}_learnt", _learnt_faults(answers.learnt, np.diff(lists.offsets))
        yield f"{side}_num_tokens", iter([(count != _lengths(answers.learnt), "is not the number of learnt tokens")])
        yield f"{side}_ref_logp", iter([(~(np.isfinite(logp) & (logp <= 0)), "is not finite or above 0")])
        for site, features in zip(sites, answers.features, strict=True):
            yield feature_column(side, site), _feature_faults(features, widths[site])


def _token_faults(tokens: Lists) -> Faults:
    yield np.diff(tokens.offsets) == 0, "holds no tokens"
    yield _rows_with(tokens, _items(tokens) < 0), "holds a negative token id"


def _learnt_faults(learnt: Lists, lengths: npt.NDArray[np.integer[Any]]) -> Faults:
    bounds = np.diff(learnt.offsets)
    yield (bounds == 0) | (bounds % 2 == 1), "is not a first token and one past the last of every span"
    items, row_of = _items(learnt).astype(np.int64), np.repeat(np.arange(len(bounds)), bounds)
    before = np.concatenate(([0], items))[:-1]
    before[_places(learnt) == 0] = 0
    # A span has at least one token; it may begin where the one before ends.
    yield _rows_with(learnt, items - before < _places(learnt) % 2), "has spans that are empty or not in order"
    last = np.zeros(len(bounds), dtype=np.int64)
    last[row_of] = items  # numpy keeps the last of several assignments to one row
    yield last != lengths, "does not end with the response"


def _lengths(learnt: Lists) -> npt.NDArray[np.int64]:
    """The number of tokens in the spans of each row."""
    signed = np.where(_places(learnt) % 2 == 1, 1, -1) * _items(learnt).astype(np.int64)
    sums = np.concatenate(([0], np.cumsum(signed)))
    lengths: npt.NDArray[np.int64] = np.diff(sums[learnt.offsets - learnt.offsets[0]])
    return lengths


def _places(lists: Lists) -> npt.NDArray[np.int64]:
    """The position of each item within its row."""
    starts = lists.offsets[:-1] - lists.offsets[0]
    places: npt.NDArray[np.int64] = np.arange(len(_items(lists))) - np.repeat(starts, np.diff(lists.offsets))
    return places


def _pair_id_faults(columns: Columns) -> Faults:
    names = columns.pair_ids.to_pylist()
    rows = np.zeros(len(names), dtype=np.int64)
    wrong = np.zeros(len(names), dtype=np.bool_)
    for i, name in enumerate(names):
        rows[i] = raw_row_of(name)
        tokens = (columns.prompt.row(i), columns.chosen.row(i), columns.rejected.row(i))
        wrong[i] = name != pair_id(*tokens, int(rows[i]))
    yield wrong, "does not belong to its token ids"
    yield np.diff(rows, prepend=-1) <= 0, "has a raw row number that is not above the one before"


def _feature_faults(features: FeatureColumn, width: int) -> Faults:
    ids, values, floor, nnz = features.ids, features.values, features.floor, features.nnz
    kept = np.diff(ids.offsets)
    yield kept != np.diff(values.offsets), "ids and values differ in number"
    all_ids, all_values = _items(ids).astype(np.int64), _items(values)
    row_of = np.repeat(np.arange(len(kept)), kept)
    descends = np.zeros(len(all_ids), dtype=np.bool_)
    descends[1:] = (np.diff(all_ids) <= 0) & (np.diff(row_of) == 0)
    yield _rows_with(ids, descends), "ids are not in ascending order, each once"
    yield _rows_with(ids, all_ids >= width), f"ids reach past the SAE's width of {width}"
    yield _rows_with(values, ~(np.isfinite(all_values) & (all_values > 0))), "values are not finite or not above 0"
    yield ~(np.isfinite(floor) & (floor >= 0)), "floor is not finite or below 0"
    yield _rows_with(values, np.repeat(floor, kept) > all_values), "floor is above a kept value"
    yield (nnz < kept) | (nnz > width), "nnz is below the number of ids or above the SAE's width"
    yield (floor == 0) & (nnz != kept), "floor is 0, so nothing was left out, but nnz is not the number of ids"
    yield (floor > 0) & (nnz == kept), "floor is above 0, so something was left out, but nnz is the number of ids"


def _items(lists: Lists) -> npt.NDArray[Any]:
    """The items of all rows; the buffer of a sliced array holds more."""
    return lists.values[lists.offsets[0] : lists.offsets[-1]]


def _rows_with(lists: Lists, broken: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """A mask over rows that is true where any item of the row is broken."""
    rows = np.zeros(len(lists.offsets) - 1, dtype=np.bool_)
    rows[np.repeat(np.arange(len(rows)), np.diff(lists.offsets))[broken]] = True
    return rows
