"""Pairs to packed rows that share the prompt, and conversations to packed rows.

In: tokenised pairs and a token budget. Out: rows `prompt · chosen · rejected · prompt · chosen · …` with position ids
that restart after each prompt, and the positions from which
every response token is predicted. Packing is a pure function of (pairs, token budget). Conversations are packed end to
end by the same rules; there the assistant's tokens are the ones that are predicted.

Shapes: L positions of a row, T learnt tokens of a row, R responses of a row (two a pair: chosen, rejected; or one a
conversation: its assistant turns together).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...cache.errors import UserError
from ...cache.schema import Pair
from ..data.tokenize import Conversation
from ..model.flex import BLOCK, LEAST_BLOCKS, RowBlocks, row_blocks

PADDING = -1
# So many pairs of a row are named in a message; the others are counted.
NAMED = 8
PROMPT, CHOSEN, REJECTED = 0, 1, 2


class RowLayout(NamedTuple):
    """What an attention implementation asks of rows.

    Attributes:
        pad_to: row lengths are padded to a multiple of this, to bound the number of shapes that a compiler sees.
        windows: sliding windows of the model's kinds of layers, None for full attention; a row gets the `RowBlocks` of
            each.
    """

    pad_to: int = 1
    windows: tuple[int | None, ...] = ()

    def padding(self, tokens: int) -> int:
        """How many padding positions a row of `tokens` tokens gets."""
        return max(-tokens % self.pad_to, LEAST_BLOCKS * BLOCK - tokens if self.windows else 0)

    def blocks(
        self,
        position_ids_L: NDArray[np.int64],
        pair_L: NDArray[np.int64],
        part_L: NDArray[np.int64],
        device: torch.device | str = "cpu",
    ) -> tuple[RowBlocks, ...]:
        """The `RowBlocks` of a row for each window."""
        made = (row_blocks(position_ids_L, pair_L, part_L, window) for window in self.windows)
        return tuple(blocks.with_tensors(lambda tensor: tensor.to(device)) for blocks in made)


@dataclass(frozen=True, eq=False)
class PackedRow:
    """One row of packed pairs or conversations, ready for one forward pass with batch size 1.

    Attributes:
        pairs: index of each packed pair (or conversation) in the list that was packed, ascending.
        names: the `pair_id` of each, or the conversation's raw row.
        input_ids_L: int64, token ids; 0 on padding.
        position_ids_L: int64, restart at 0 for each pair and after its prompt for its rejected response.
        pair_L: int64, which pair of the row a position belongs to; `PADDING` on padding.
        part_L: int64, `PROMPT`, `CHOSEN` or `REJECTED`.
        sources_T: int64, the row position from which each learnt token is predicted: the last prompt position and
            the response's own positions but the last; of a response of several turns only those before learnt tokens.
            Chosen before rejected, pair by pair.
        targets_T: int64, the learnt response tokens, in the order of `sources_T`.
        lengths: number of learnt tokens of each response, R entries that sum to T.
        tokens: tokens of the row without padding.
        blocks: what attends to what, an entry for each window of the layout that it was packed for.
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
        """The row in memory that a GPU copies from while it computes; the loader calls it where there is one."""
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
        for row, left in enumerate(room):
            if lengths[index] <= left:
                rows[row].append(index)
                room[row] -= lengths[index]
                break
        else:
            rows.append([index])
            room.append(token_budget - lengths[index])
    return [sorted(row) for row in rows]


def pack(
    pairs: Sequence[Pair], token_budget: int, pad_to: int = 1, windows: Sequence[int | None] = ()
) -> list[PackedRow]:
    """Packs pairs into rows.

    Args:
        pairs: the pairs, each with a non-empty prompt and non-empty responses.
        token_budget: tokens a row may hold, prompts counted once; a longer pair has a row of its own.
        pad_to: as in `RowLayout`.
        windows: as in `RowLayout`.

    Returns:
        The rows; each pair is in exactly one.

    Raises:
        UserError: the budget is not positive.
    """
    return list(packed_rows(pairs, token_budget, RowLayout(pad_to, tuple(windows))))


def packed_rows(pairs: Sequence[Pair], token_budget: int, layout: RowLayout) -> Iterator[PackedRow]:
    """`pack` as a generator: each row is built only when it is needed."""
    lengths = [pair.prompt_ids.size + pair.chosen_ids.size + pair.rejected_ids.size for pair in pairs]
    for row in plan_rows(lengths, token_budget):
        yield _pack_row([pairs[i] for i in row], row, layout)


def pack_conversations(
    conversations: Sequence[Conversation], token_budget: int, pad_to: int = 1, windows: Sequence[int | None] = ()
) -> list[PackedRow]:
    """Packs conversations into rows.

    Args:
        conversations: each with a learnt token, which is not its first.
        token_budget: as in `pack`.
        pad_to: as in `pack`.
        windows: as in `pack`.

    Returns:
        The rows, `PROMPT` everywhere, one response a conversation; each conversation is in exactly one.

    Raises:
        UserError: the budget is not positive.
    """
    rows = plan_rows([conversation.ids.size for conversation in conversations], token_budget)
    layout = RowLayout(pad_to, tuple(windows))
    return [_pack_conversations_row([conversations[i] for i in row], row, layout) for row in rows]


def _pack_conversations_row(
    conversations: Sequence[Conversation], indices: Sequence[int], layout: RowLayout
) -> PackedRow:
    sources, targets = [], []
    start = 0
    for conversation in conversations:
        (learnt,) = conversation.learnt.nonzero()
        assert learnt.size and learnt[0] > 0, "a learnt token is predicted from the one before it"
        sources.append(start + learnt - 1)
        targets.append(conversation.ids[learnt])
        start += conversation.ids.size
    sizes = [conversation.ids.size for conversation in conversations]
    return _row(
        indices,
        [str(conversation.raw_row) for conversation in conversations],
        layout,
        tokens=[conversation.ids for conversation in conversations],
        positions=[np.arange(size) for size in sizes],
        pair_of=[np.full(size, number) for number, size in enumerate(sizes)],
        part_of=[np.full(size, PROMPT) for size in sizes],
        sources=sources,
        targets=targets,
    )


def _pack_row(pairs: Sequence[Pair], indices: Sequence[int], layout: RowLayout) -> PackedRow:
    tokens, positions, pair_of, part_of, sources, targets = [], [], [], [], [], []
    start = 0
    for number, pair in enumerate(pairs):
        prompt = pair.prompt_ids.size
        assert prompt > 0, "a pair needs a prompt token to predict from"
        tokens.append(pair.prompt_ids)
        positions.append(np.arange(prompt))
        part_of.append(np.full(prompt, PROMPT))
        last_prompt, start = start + prompt - 1, start + prompt
        sides = ((CHOSEN, pair.chosen_ids, pair.chosen_learnt), (REJECTED, pair.rejected_ids, pair.rejected_learnt))
        for part, response, spans in sides:
            length = response.size
            assert length > 0, "a response has at least one token"
            assert spans[-1] == length, "a response ends with a token that is learnt"
            tokens.append(response)
            positions.append(np.arange(prompt, prompt + length))
            part_of.append(np.full(length, part))
            learnt = np.concatenate([np.arange(*span) for span in spans.reshape(-1, 2)])
            sources.append(np.concatenate(([last_prompt], np.arange(start, start + length - 1)))[learnt])
            targets.append(response[learnt])
            start += length
        pair_of.append(np.full(prompt + pair.chosen_ids.size + pair.rejected_ids.size, number))
    return _row(
        indices,
        [pair.pair_id for pair in pairs],
        layout,
        tokens=tokens,
        positions=positions,
        pair_of=pair_of,
        part_of=part_of,
        sources=sources,
        targets=targets,
    )


def _row(
    indices: Sequence[int],
    names: Sequence[str],
    layout: RowLayout,
    *,
    tokens: Sequence[Any],
    positions: Sequence[Any],
    pair_of: Sequence[Any],
    part_of: Sequence[Any],
    sources: Sequence[Any],
    targets: Sequence[Any],
) -> PackedRow:
    """Joins the arrays of a row's parts and pads those with one entry a position."""
    size = sum(part.size for part in tokens)
    padding = layout.padding(size)

    def joined(parts: Sequence[Any], fill: int | None = None) -> NDArray[np.int64]:
        values = np.concatenate(parts).astype(np.int64)
        return values if fill is None else np.pad(values, (0, padding), constant_values=fill)

    structure = joined(positions, 0), joined(pair_of, PADDING), joined(part_of, PROMPT)
    position_ids_L, pair_L, part_L = (torch.from_numpy(values) for values in structure)
    return PackedRow(
        pairs=tuple(indices),
        names=tuple(names),
        input_ids_L=torch.from_numpy(joined(tokens, 0)),
        position_ids_L=position_ids_L,
        pair_L=pair_L,
        part_L=part_L,
        sources_T=torch.from_numpy(joined(sources)),
        targets_T=torch.from_numpy(joined(targets)),
        lengths=tuple(part.size for part in targets),
        tokens=size,
        blocks=layout.blocks(*structure),
    )
