"""Pairs and conversations to packed rows, in which a pair's responses share its prompt.

In: tokenised pairs, or conversations, and a token budget. Out: rows `prompt · chosen · rejected · prompt · chosen · …`
with position ids that restart after each prompt, and the positions that predict each learnt token. A row of
conversations holds them end to end; its learnt tokens are the assistant's. Packing is a pure function of its inputs.

Shapes: L positions of a row, T learnt tokens of a row, R responses of a row (two a pair: chosen, rejected; or one a
conversation: all turns of its assistant).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from ...cache.errors import UserError
from ...cache.schema import Pair
from ..data.tokenize import Conversation
from ..model.flex import BLOCK, LEAST_BLOCKS, RowBlocks, row_blocks

PADDING = -1
# A message names at most this many pairs of a row and counts the others.
NAMED = 8
PROMPT, CHOSEN, REJECTED = 0, 1, 2


class RowLayout(NamedTuple):
    """What an attention implementation asks of rows.

    Attributes:
        pad_to: row lengths are padded to a multiple of this, to bound the number of shapes that a compiler sees.
        windows: the sliding window of each kind of layer, None for full attention; a row gets `RowBlocks` for each.
    """

    pad_to: int = 1
    windows: tuple[int | None, ...] = ()

    def padding(self, tokens: int) -> int:
        """How many padding positions a row of `tokens` tokens gets."""
        return max(-tokens % self.pad_to, LEAST_BLOCKS * BLOCK - tokens if self.windows else 0)


UNPADDED = RowLayout()


@dataclass(frozen=True, eq=False)
class PackedRow:
    """One row of packed pairs or conversations, ready for one forward pass with batch size 1.

    Attributes:
        pairs: index of each packed pair (or conversation) in the list that was packed, ascending.
        names: the `pair_id` of each, or the conversation's raw row.
        input_ids_L: int64, token ids; 0 on padding.
        position_ids_L: int64, restart at 0 for each pair and after its prompt for its rejected response.
        pair_L: int64, which pair of the row a position belongs to; `PADDING` on padding.
        part_L: int64, `PROMPT`, `CHOSEN` or `REJECTED`; a conversation is `PROMPT` throughout.
        sources_T: int64, the row position that predicts each learnt token: the last of the prompt or one of the
            response. Chosen before rejected, pair by pair.
        targets_T: int64, the learnt tokens, in the order of `sources_T`.
        lengths: number of learnt tokens of each response, R entries that sum to T.
        tokens: tokens of the row without padding.
        blocks: what attends to what, an entry for each window of the row's layout.
    """

    pairs: tuple[int, ...]
    names: tuple[str, ...]
    input_ids_L: Tensor
    position_ids_L: Tensor
    pair_L: Tensor
    part_L: Tensor
    sources_T: Tensor
    targets_T: Tensor
    lengths: tuple[int, ...]
    tokens: int
    blocks: tuple[RowBlocks, ...] = ()

    def to(self, device: torch.device | str, non_blocking: bool = True) -> "PackedRow":
        """The row with its tensors on `device`; accelerate's loader calls it."""
        return self._with_tensors(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "PackedRow":
        """The row in pinned memory, from which a GPU copies while it computes; the Trainer's loader calls it."""
        return self._with_tensors(Tensor.pin_memory)

    def _with_tensors(self, change: Callable[[Tensor], Tensor]) -> "PackedRow":
        changed: dict[str, Any] = {
            name: change(value) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **changed, blocks=tuple(blocks.with_tensors(change) for blocks in self.blocks))


def named(names: Sequence[str], noun: str) -> str:
    """The pairs (or conversations) of a row, for a message: `pair A`, or `pairs A, B, C and 4 more`."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{noun}{'s' if len(names) > 1 else ''} {', '.join(names[:NAMED])}{more}"


def plan_rows(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Groups sequences into rows of at most `token_budget` tokens: longest first, each into the first row with room.

    Args:
        lengths: tokens of each sequence.
        token_budget: tokens a row may hold; a sequence longer than it has a row of its own.

    Returns:
        Rows of indices into `lengths`, ascending inside a row; every index once.

    Raises:
        UserError: the budget is not positive.
    """
    if token_budget < 1:
        raise UserError(f"token budget: expected at least 1, found {token_budget}; see --token-budget")
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        row = next((row for row, left in enumerate(room) if lengths[index] <= left), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(token_budget)
        rows[row].append(index)
        room[row] -= lengths[index]
    return [sorted(row) for row in rows]


def pack(pairs: Sequence[Pair], token_budget: int, layout: RowLayout = UNPADDED) -> Iterator[PackedRow]:
    """Packs pairs into rows, each built only when it is asked for; every pair is in exactly one.

    Args:
        pairs: the pairs, each with a non-empty prompt and non-empty responses.
        token_budget: tokens a row may hold, prompts counted once; a longer pair has a row of its own.
        layout: what the model's attention asks of rows (`row_layout`).

    Raises:
        UserError: the budget is not positive.
    """
    lengths = [pair.prompt_ids.size + pair.chosen_ids.size + pair.rejected_ids.size for pair in pairs]
    for row in plan_rows(lengths, token_budget):
        yield _pack_pairs([pairs[i] for i in row], row, layout)


def pack_conversations(
    conversations: Sequence[Conversation], token_budget: int, layout: RowLayout = UNPADDED
) -> Iterator[PackedRow]:
    """Packs conversations into rows, one response a conversation; every conversation is in exactly one row.

    Args:
        conversations: each with a learnt token, which is not its first.
        token_budget: as in `pack`.
        layout: as in `pack`.

    Raises:
        UserError: the budget is not positive.
    """
    for row in plan_rows([conversation.ids.size for conversation in conversations], token_budget):
        yield _pack_conversations([conversations[i] for i in row], row, layout)


class _Piece(NamedTuple):
    """A run of a row's tokens: its ids, its first position id, its pair in the row and its part of that pair."""

    ids: NDArray[np.int32]
    position: int
    pair: int
    part: int


def _pack_pairs(pairs: Sequence[Pair], indices: Sequence[int], layout: RowLayout) -> PackedRow:
    pieces, sources, targets = [], [], []
    start = 0
    for number, pair in enumerate(pairs):
        prompt = pair.prompt_ids.size
        assert prompt > 0, "a pair needs a prompt token to predict from"
        pieces.append(_Piece(pair.prompt_ids, 0, number, PROMPT))
        last_prompt, start = start + prompt - 1, start + prompt
        sides = ((CHOSEN, pair.chosen_ids, pair.chosen_learnt), (REJECTED, pair.rejected_ids, pair.rejected_learnt))
        for part, response, spans in sides:
            length = response.size
            assert length > 0, "a response has at least one token"
            assert spans[-1] == length, "a response ends with a token that is learnt"
            pieces.append(_Piece(response, prompt, number, part))
            learnt = np.concatenate([np.arange(*span) for span in spans.reshape(-1, 2)])
            sources.append(np.append(last_prompt, np.arange(start, start + length - 1))[learnt])
            targets.append(response[learnt])
            start += length
    return _row(indices, [pair.pair_id for pair in pairs], layout, pieces, sources, targets)


def _pack_conversations(conversations: Sequence[Conversation], indices: Sequence[int], layout: RowLayout) -> PackedRow:
    pieces, sources, targets = [], [], []
    start = 0
    for number, conversation in enumerate(conversations):
        (learnt,) = conversation.learnt.nonzero()
        assert learnt.size and learnt[0] > 0, "a learnt token is predicted from the one before it"
        pieces.append(_Piece(conversation.ids, 0, number, PROMPT))
        sources.append(start + learnt - 1)
        targets.append(conversation.ids[learnt])
        start += conversation.ids.size
    names = [str(conversation.raw_row) for conversation in conversations]
    return _row(indices, names, layout, pieces, sources, targets)


def _row(
    indices: Sequence[int],
    names: Sequence[str],
    layout: RowLayout,
    pieces: Sequence[_Piece],
    sources: Sequence[NDArray[Any]],
    targets: Sequence[NDArray[Any]],
) -> PackedRow:
    """Joins the pieces of a row and pads it."""

    def tensor(values: Any) -> Tensor:
        return torch.from_numpy(np.asarray(values, np.int64))

    sizes = [piece.ids.size for piece in pieces]
    row = PackedRow(
        pairs=tuple(indices),
        names=tuple(names),
        input_ids_L=tensor(np.concatenate([piece.ids for piece in pieces])),
        position_ids_L=tensor(np.concatenate([piece.position + np.arange(piece.ids.size) for piece in pieces])),
        pair_L=tensor(np.repeat([piece.pair for piece in pieces], sizes)),
        part_L=tensor(np.repeat([piece.part for piece in pieces], sizes)),
        sources_T=tensor(np.concatenate(sources)),
        targets_T=tensor(np.concatenate(targets)),
        lengths=tuple(part.size for part in targets),
        tokens=sum(sizes),
    )
    return padded(row, layout)


def padded(row: PackedRow, layout: RowLayout) -> PackedRow:
    """Pads a row and adds the blocks of its layout."""
    fills = {"input_ids_L": 0, "position_ids_L": 0, "pair_L": PADDING, "part_L": PROMPT}
    ends = (0, layout.padding(row.tokens))
    changed: dict[str, Any] = {name: pad(getattr(row, name), ends, value=fill) for name, fill in fills.items()}
    row = replace(row, **changed)
    if not layout.windows:
        return row
    structure = (row.position_ids_L, row.pair_L, row.part_L)
    position_ids_L, pair_L, part_L = (values_L.numpy(force=True) for values_L in structure)
    blocks = (row_blocks(position_ids_L, pair_L, part_L, window) for window in layout.windows)
    device = row.input_ids_L.device
    return replace(row, blocks=tuple(one.with_tensors(lambda tensor: tensor.to(device)) for one in blocks))
