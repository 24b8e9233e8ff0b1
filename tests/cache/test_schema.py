import hashlib
import struct

import numpy as np
import pyarrow as pa
import pytest
from cache_rows import WIDTHS, assert_same, random_rows, table_to_rows
from fpo.cache.columns import rows_to_table
from fpo.cache.schema import arrow_schema, pair_id, raw_row_of
from hypothesis import given, settings
from hypothesis import strategies as st

token_lists = st.lists(st.integers(0, 2**31 - 1), max_size=6)


@settings(max_examples=60, deadline=None)
@given(token_lists, token_lists, token_lists, st.integers(0, 10**9), st.data())
def test_pair_ids_tell_apart_where_one_list_ends(prompt, chosen, rejected, raw_row, data):
    joined = [*prompt, *chosen, *rejected]
    cuts = sorted(data.draw(st.tuples(*[st.integers(0, len(joined))] * 2)))
    other = (joined[: cuts[0]], joined[cuts[0] : cuts[1]], joined[cuts[1] :])
    same = pair_id(*other, raw_row) == pair_id(prompt, chosen, rejected, raw_row)
    assert same == (other == (prompt, chosen, rejected))


def test_pair_id_is_the_documented_hash():
    lengths, tokens = (2, 1, 1), (5, 6, 7, 8)
    digest = hashlib.sha256(struct.pack("<7i", *lengths, *tokens)).hexdigest()
    assert pair_id(np.array([5, 6]), [7], [8], 42) == f"{digest[:16]}-42"
    assert raw_row_of(f"{digest[:16]}-42") == 42


@pytest.mark.parametrize(
    "name", ["", "a8a91a5ba1b3fde2", "a8a91a5ba1b3fde2-042", "a8a91a5ba1b3fde2--1", "A8a91a5ba1b3fde2-1"]
)
def test_what_is_no_pair_id_is_refused(name: str):
    with pytest.raises(ValueError, match="pair_id"):
        raw_row_of(name)


def test_no_column_is_nullable_and_ids_are_as_narrow_as_the_width_allows():
    schema = arrow_schema([1 << 16, (1 << 16) + 1])

    def nullable(field: pa.Field) -> bool:
        children = [field.type.field(i) for i in range(field.type.num_fields)]
        return bool(field.nullable) or any(nullable(child) for child in children)

    assert not any(nullable(field) for field in schema)
    assert not any("." in name for name in schema.names)
    assert schema.field("chosen_features_0").type.field("ids").type.value_type == pa.uint16()
    assert schema.field("rejected_features_1").type.field("ids").type.value_type == pa.uint32()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 6), st.sampled_from([[], WIDTHS[:1], WIDTHS]))
def test_rows_survive_the_table(seed: int, num_rows: int, widths: list[int]):
    rows = random_rows(seed, range(num_rows), widths)
    table = rows_to_table(rows, widths)
    assert table.schema.equals(arrow_schema(widths))
    for found, expected in zip(table_to_rows(table), rows, strict=True):
        assert_same(found, expected)


def test_rows_survive_a_sliced_table():
    rows = random_rows(0, range(6))
    table = rows_to_table(rows, WIDTHS).slice(2, 3)
    for found, expected in zip(table_to_rows(table), rows[2:5], strict=True):
        assert_same(found, expected)


def test_numbers_that_do_not_fit_are_refused_not_wrapped():
    row = random_rows(0, [0])[0]
    features = row.chosen.features[0]
    object.__setattr__(features, "ids", features.ids.astype(np.int64) + (1 << 16))
    with pytest.raises(ValueError, match="not in range"):
        rows_to_table([row], WIDTHS)


def test_values_of_another_dtype_are_refused_not_rounded():
    row = random_rows(0, [0])[0]
    features = row.chosen.features[0]
    object.__setattr__(features, "values", features.values.astype(np.float64))
    with pytest.raises(ValueError, match="expected float32, found float64"):
        rows_to_table([row], WIDTHS)


def test_a_row_with_too_few_sites_is_named():
    row = random_rows(0, [7], WIDTHS[:1])[0]
    with pytest.raises(ValueError, match=f"{row.pair.pair_id}, chosen: expected features of 2 sites, found 1"):
        rows_to_table([row], WIDTHS)
