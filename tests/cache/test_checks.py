import math
import re
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pytest
from cache_rows import WIDTHS, random_rows
from fpo.cache.checks import check_table
from fpo.cache.columns import rows_to_table
from fpo.cache.schema import CachedPair, Pair, ReferenceResponse, SparseFeatures, arrow_schema, pair_id
from hypothesis import given, settings
from hypothesis import strategies as st

BAD_ROW = 2


def features(ids=(3, 5, 9), values=(1.0, 3.0, 2.0), floor=0.5, nnz=7) -> SparseFeatures:
    return SparseFeatures(np.array(ids, dtype=np.uint16), np.array(values, dtype=np.float32), floor, nnz)


def row(
    prompt=(1, 2), chosen=(3,), rejected=(4, 5), learnt=(), name: str | None = None, raw_row: int = BAD_ROW, **answer
) -> CachedPair:
    lists = [np.array(ids, dtype=np.int32) for ids in (prompt, chosen, rejected)]
    entry = answer.get("features", features())
    left = ReferenceResponse(-1.0, len(chosen), (features(),))
    right = ReferenceResponse(answer.get("logp", -1.0), answer.get("num_tokens", len(rejected)), (entry,))
    spans = np.array(learnt, dtype=np.int32)
    return CachedPair(Pair(name or pair_id(*lists, raw_row), *lists, rejected_learnt=spans), left, right)


RULES: dict[str, tuple[str, CachedPair]] = {
    "empty prompt": ("prompt_ids: holds no tokens", row(prompt=())),
    "empty response": ("rejected_ids: holds no tokens", row(rejected=())),
    "negative token": ("chosen_ids: holds a negative token id", row(chosen=(-1,))),
    "foreign pair_id": ("pair_id: does not belong", row(name=f"{'0' * 16}-2")),
    "repeated raw row": ("pair_id: has a raw row number", row(raw_row=BAD_ROW - 1)),
    "no span": ("rejected_learnt: is not a first token and one past", row(learnt=(0, 1, 2))),
    "empty span": ("rejected_learnt: has spans that are empty", row(learnt=(0, 0, 1, 2), num_tokens=1)),
    "spans that overlap": ("rejected_learnt: has spans that are empty or not in", row(learnt=(0, 2, 1, 2))),
    "span before the response": ("rejected_learnt: has spans that are empty or not in", row(learnt=(-1, 2))),
    "context at the end": ("rejected_learnt: does not end with the response", row(learnt=(0, 1), num_tokens=1)),
    "span past the end": ("rejected_learnt: does not end with the response", row(learnt=(0, 3), num_tokens=3)),
    "num_tokens of all": ("rejected_num_tokens: is not the number", row(learnt=(1, 2), num_tokens=2)),
    "num_tokens": ("rejected_num_tokens: is not the number", row(num_tokens=3)),
    "logp above 0": ("rejected_ref_logp: is not finite or above 0", row(logp=1e-9)),
    "logp nan": ("rejected_ref_logp: is not finite", row(logp=math.nan)),
    "logp inf": ("rejected_ref_logp: is not finite", row(logp=-math.inf)),
    "unsorted ids": ("rejected_features_0: ids are not in ascending order", row(features=features(ids=(5, 3, 9)))),
    "repeated ids": ("rejected_features_0: ids are not in ascending order", row(features=features(ids=(3, 3, 9)))),
    "id at the width": ("rejected_features_0: ids reach past", row(features=features(ids=(3, 5, 64)))),
    "fewer values": ("rejected_features_0: ids and values differ", row(features=features(values=(1.0, 2.0)))),
    "value 0": (
        "rejected_features_0: values are not finite or not above 0",
        row(features=features(values=(1.0, 0.0, 1.0))),
    ),
    "value nan": ("rejected_features_0: values are not finite", row(features=features(values=(1.0, math.nan, 1.0)))),
    "value inf": ("rejected_features_0: values are not finite", row(features=features(values=(1.0, math.inf, 1.0)))),
    "floor nan": ("rejected_features_0: floor is not finite", row(features=features(floor=math.nan))),
    "floor below 0": ("rejected_features_0: floor is not finite or below 0", row(features=features(floor=-0.5))),
    "floor above the smallest": ("rejected_features_0: floor is above a kept value", row(features=features(floor=1.5))),
    "nnz below kept": ("rejected_features_0: nnz is below the number of ids", row(features=features(nnz=2))),
    "nnz above width": ("rejected_features_0: nnz is below .* above the SAE's width", row(features=features(nnz=65))),
    "floor 0, some left out": ("rejected_features_0: floor is 0, so nothing", row(features=features(floor=0.0))),
    "floor above 0, none left out": (
        "rejected_features_0: floor is above 0, so something",
        row(features=features(nnz=3)),
    ),
}


@pytest.mark.parametrize("rule", RULES)
def test_a_broken_rule_is_told_with_row_pair_and_column(rule: str):
    message, bad = RULES[rule]
    rows = [row(raw_row=0), row(raw_row=1), bad, row(raw_row=3)]
    check_table(rows_to_table([*rows[:BAD_ROW], row(), *rows[BAD_ROW + 1 :]], [64]), [64])
    with pytest.raises(ValueError, match=rf"^row {BAD_ROW} \({re.escape(bad.pair.pair_id)}\), \w+: .*") as error:
        check_table(rows_to_table(rows, [64]), [64])
    assert re.search(message, str(error.value))


def test_a_pair_id_that_is_none_is_told():
    with pytest.raises(ValueError, match="pair_id: expected 16 hex digits"):
        check_table(rows_to_table([row(name="first")], [64]), [64])


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 8))
def test_sound_rows_pass_also_sliced_and_in_chunks(seed: int, num_rows: int):
    table = rows_to_table(random_rows(seed, range(num_rows)), WIDTHS)
    check_table(table, WIDTHS)
    check_table(table.slice(1), WIDTHS)
    check_table(pa.concat_tables([table.slice(0, 2), table.slice(2)]), WIDTHS)


def test_values_at_the_edge_pass():
    edge = [features(ids=(0, 1, 63), nnz=64), features(ids=(), values=(), floor=0.0, nnz=0), features(floor=1.0)]
    check_table(rows_to_table([row(raw_row=i, features=entry, logp=0.0) for i, entry in enumerate(edge)], [64]), [64])


def with_column(table: pa.Table, name: str, change: Callable[[pa.Array], pa.Array]) -> pa.Table:
    index = table.column_names.index(name)
    return table.set_column(index, table.schema.field(index), change(table.column(name).combine_chunks()))


def null_items(array: pa.ListArray) -> pa.ListArray:
    return pa.ListArray.from_arrays(array.offsets, pa.nulls(len(array.values), array.type.value_type), type=array.type)


def null_floor(array: pa.StructArray) -> pa.StructArray:
    ids, values, _, nnz = array.flatten()
    return pa.StructArray.from_arrays([ids, values, pa.nulls(len(array), pa.float32()), nnz], fields=list(array.type))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("chosen_ref_logp", lambda array: pa.nulls(len(array), array.type)),
        ("prompt_ids", lambda array: pa.nulls(len(array), array.type)),
        ("rejected_ids", null_items),
        ("rejected_features_1", null_floor),
    ],
)
def test_nulls_are_refused_at_every_depth(name: str, change: Callable[[pa.Array], pa.Array]):
    table = rows_to_table(random_rows(0, range(3)), WIDTHS)
    with pytest.raises(ValueError, match=f"^{name}: holds nulls"):
        check_table(with_column(table, name, change), WIDTHS)


def test_missing_and_foreign_columns_are_named():
    table = rows_to_table(random_rows(0, range(3)), WIDTHS)
    with pytest.raises(ValueError, match=r"columns: expected .*chosen_ids"):
        check_table(table.drop_columns(["chosen_ids"]), WIDTHS)
    with pytest.raises(ValueError, match=r"columns: .*found .*chosen_features_1"):
        check_table(table, WIDTHS[:1])


def test_a_part_of_the_sites_is_checked_against_its_own_widths():
    table = rows_to_table(random_rows(0, range(8)), WIDTHS)
    second = table.select(arrow_schema(WIDTHS, [1]).names)
    check_table(second, WIDTHS, [1])
    with pytest.raises(ValueError, match="_features_1: ids reach past the SAE's width of 65537"):
        check_table(second, [64, 65_537], [1])
