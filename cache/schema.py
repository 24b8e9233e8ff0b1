"""A row of the cache: its types, the name of a pair, and the Arrow columns of a shard.

In: token ids, log-probabilities and sparse pooled features as numpy arrays and numbers. Out: rows, names and a schema.

Shapes: P prompt tokens, R response tokens, S spans of learnt tokens, F features kept for one response.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

FORMAT_VERSION = 2  # 2 added the columns of learnt tokens
TOKEN_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
SIDES = ("chosen", "rejected")
LEARNT_COLUMNS = tuple(f"{side}_learnt" for side in SIDES)

_PAIR_ID = re.compile(r"[0-9a-f]{16}-(0|[1-9][0-9]*)")

Int32 = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Pair:
    """One tokenised preference pair.

    Attributes:
        pair_id: `pair_id()` of the token ids and the raw row number.
        prompt_ids: int32 [P], from BOS to the header of the assistant's turn; both responses share it.
        chosen_ids: int32 [R], the preferred response and the token that ends its turn.
        rejected_ids: int32 [R], the other response and the token that ends its turn.
        chosen_learnt: int32 [2S], the spans of learnt tokens as start and stop positions in the response; tokens
            between spans are context. The default is [0, R], the whole response.
        rejected_learnt: int32 [2S], the same for the rejected response.
    """

    pair_id: str
    prompt_ids: Int32
    chosen_ids: Int32
    rejected_ids: Int32
    chosen_learnt: Int32 = field(default_factory=lambda: np.zeros(0, np.int32))
    rejected_learnt: Int32 = field(default_factory=lambda: np.zeros(0, np.int32))

    def __post_init__(self) -> None:
        for side in SIDES:
            if not getattr(self, f"{side}_learnt").size:
                whole = np.asarray([0, getattr(self, f"{side}_ids").size], np.int32)
                object.__setattr__(self, f"{side}_learnt", whole)


@dataclass(frozen=True, eq=False)
class SparseFeatures:
    """The largest pooled SAE activations of one response at one site.

    Attributes:
        ids: unsigned [F], ascending, each below the SAE's width.
        values: float32 [F], mean activation over the positions that predict learnt tokens, each > 0.
        floor: the largest activation that was not kept; 0 if all were kept.
        nnz: how many activations were above 0 before the cut; F if all were kept.
    """

    ids: npt.NDArray[np.unsignedinteger[Any]]
    values: Float32
    floor: float
    nnz: int


@dataclass(frozen=True, eq=False)
class ReferenceResponse:
    """The reference model's measurements of one response.

    Attributes:
        logp: log-probability of the learnt tokens, nats, summed in float64.
        num_tokens: the number of learnt tokens, over which `logp` is summed.
        features: one entry per site, in the manifest's order.
    """

    logp: float
    num_tokens: int
    features: tuple[SparseFeatures, ...]


@dataclass(frozen=True, eq=False)
class CachedPair:
    """One row of the cache: a pair and the reference's measurements of both responses."""

    pair: Pair
    chosen: ReferenceResponse
    rejected: ReferenceResponse


def pair_id(prompt_ids: npt.ArrayLike, chosen_ids: npt.ArrayLike, rejected_ids: npt.ArrayLike, raw_row: int) -> str:
    """Names a pair: 16 hex digits of the SHA-256 of its token ids, `-`, its row in the raw data.

    The three lengths are hashed first, so that moving tokens from one list to the next changes the name.

    Args:
        prompt_ids: integers [P].
        chosen_ids: integers [R].
        rejected_ids: integers [R].
        raw_row: the row number in the raw data, from 0.
    """
    lists = [np.asarray(ids, dtype="<i4") for ids in (prompt_ids, chosen_ids, rejected_ids)]
    lengths = np.asarray([len(ids) for ids in lists], dtype="<i4")
    digest = hashlib.sha256(np.concatenate([lengths, *lists]).tobytes()).hexdigest()
    return f"{digest[:16]}-{raw_row}"


def raw_row_of(name: str) -> int:
    """The raw row number in a `pair_id`.

    Raises:
        ValueError: `name` is not a pair_id.
    """
    match = _PAIR_ID.fullmatch(name)
    if match is None:
        raise ValueError(f"pair_id: expected 16 hex digits, '-' and a row number, found {name!r}")
    return int(match[1])


def arrow_schema(widths: Sequence[int], sites: Sequence[int] | None = None) -> pa.Schema:
    """The columns of a shard.

    Args:
        widths: the number of SAE features at each site of the cache, in the manifest's order.
        sites: indices into `widths` of the sites whose columns are wanted, in that order; all by default.
    """
    fields = [_field("pair_id", pa.string())]
    fields += [_field(name, _list(pa.int32())) for name in TOKEN_COLUMNS]
    for side in SIDES:
        fields.append(_field(f"{side}_learnt", _list(pa.int32())))
        fields += [_field(f"{side}_ref_logp", pa.float64()), _field(f"{side}_num_tokens", pa.int32())]
        for site in range(len(widths)) if sites is None else sites:
            # The largest id is width - 1, so 65,536 features still fit 16 bits.
            id_type = pa.uint16() if widths[site] <= 1 << 16 else pa.uint32()
            children = [
                _field("ids", _list(id_type)),
                _field("values", _list(pa.float32())),
                _field("floor", pa.float32()),
                _field("nnz", pa.int32()),
            ]
            fields.append(_field(feature_column(side, site), pa.struct(children)))
    return pa.schema(fields)


def feature_column(side: str, site: int) -> str:
    """The name of the struct column of one side (`chosen`, `rejected`) and site."""
    return f"{side}_features_{site}"


def _field(name: str, kind: pa.DataType) -> pa.Field:
    return pa.field(name, kind, nullable=False)


def _list(kind: pa.DataType) -> pa.DataType:
    return pa.list_(_field("element", kind))
