"""Rotary frequencies that depend on a sequence's length, which a row of several sequences does not have.

In: a packed row, and a model. Out: the row itself, or rows of those of its sequences that a model runs under the same
frequencies (`dynamic` scaling beyond the length of pre-training, `longrope` on either side of it); a model without
memory of the sequences before.

Shapes: L positions of a row, T response tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..scoring.attention import sequences_of
from ..scoring.packing import PADDING, PROMPT, PackedRow, RowLayout

# Rotary embeddings are tried at these lengths, and on either side of what the configuration calls its longest.
_LENGTHS = (64, 1024, 4097, 8193, 32769, 131073, 1048577)


@dataclass(frozen=True, eq=False)
class _Scaling:
    """A rotary embedding, or its part for one kind of layer, whose frequencies depend on length.

    Attributes:
        module: the embedding.
        prefix: of its attributes for the kind of layer.
        dynamic: whether they change with every length above the threshold, or only there.
        threshold: the longest sequence that has the frequencies of pre-training.
    """

    module: Any
    prefix: str
    dynamic: bool
    threshold: int


_KNOWN: WeakKeyDictionary[nn.Module, list[_Scaling]] = WeakKeyDictionary()


def _scalings(model: nn.Module) -> list[_Scaling]:
    if model not in _KNOWN:
        _KNOWN[model] = [scaling for module in model.modules() for scaling in _scalings_of(module)]
    return _KNOWN[model]


def _scalings_of(module: Any) -> Iterator[_Scaling]:
    kinds: Any = getattr(module, "rope_type", None)
    for layer_type, kind in (kinds if isinstance(kinds, dict) else {None: kinds}).items():
        prefix = f"{layer_type}_" if layer_type else ""
        if isinstance(kind, str) and "dynamic" in kind:
            yield _Scaling(module, prefix, True, int(module.original_max_seq_len))
        elif kind == "longrope":
            parameters = module.config.rope_parameters
            parameters = parameters[layer_type] if layer_type else parameters
            yield _Scaling(module, prefix, False, int(parameters["original_max_position_embeddings"]))


def forget_lengths(model: nn.Module) -> None:
    """Undoes what a model remembers of the longest sequence so far (`dynamic`): its next one is as a fresh model's."""
    for scaling in _scalings(model):
        if scaling.dynamic:
            module, name = scaling.module, f"{scaling.prefix}inv_freq"
            original = getattr(module, f"{scaling.prefix}original_inv_freq")
            module.register_buffer(name, original.to(getattr(module, name).device), persistent=False)
            setattr(module, f"{scaling.prefix}max_seq_len_cached", scaling.threshold)


def frequencies_of(model: nn.Module, length: int) -> tuple[int, ...]:
    """What tells apart the frequencies of sequences: equal for two lengths whose frequencies are the same."""
    return tuple(
        max(length, scaling.threshold) if scaling.dynamic else int(length > scaling.threshold)
        for scaling in _scalings(model)
    )


def of_same_frequencies(model: nn.Module, row: PackedRow, layout: RowLayout) -> list[tuple[PackedRow, Tensor | None]]:
    """A row, or the rows that it has to be taken apart into so that each has one set of rotary frequencies.

    Args:
        model: the decoder, or what holds it.
        row: the packed row.
        layout: what the row was packed for.

    Returns:
        Rows, each with the numbers (int64) of the row's targets that it predicts; None where it is the row itself. A
        pair whose responses need different frequencies is in two of them, its prompt in both.
    """
    if not _scalings(model):
        return [(row, None)]
    sequences = sequences_of(row)[: len(row.lengths)]  # what follows is padding
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, ranges in enumerate(sequences):
        groups.setdefault(frequencies_of(model, sum(map(len, ranges))), []).append(number)
    if len(groups) == 1:
        return [(row, None)]
    return [_part(row, sequences, numbers, layout) for numbers in groups.values()]


def _part(
    row: PackedRow, sequences: list[list[range]], numbers: list[int], layout: RowLayout
) -> tuple[PackedRow, Tensor]:
    """The row of some of a row's sequences, and which targets of the row are its."""
    device = row.input_ids_L.device
    kept = sorted({position for number in numbers for part in sequences[number] for position in part})
    kept_L = torch.tensor(kept, device=device)
    new_L = torch.full_like(row.input_ids_L, PADDING)
    new_L[kept_L] = torch.arange(len(kept), device=device)
    response_T = torch.repeat_interleave(torch.tensor(row.lengths, device=device))
    targets_T = torch.isin(response_T, torch.tensor(numbers, device=device)).nonzero().squeeze(1)
    padding = layout.padding(len(kept))

    def of(values_L: Tensor, fill: int) -> Tensor:
        return torch.nn.functional.pad(values_L[kept_L], (0, padding), value=fill)

    structure = of(row.position_ids_L, 0), of(row.pair_L, PADDING), of(row.part_L, PROMPT)
    position_ids_L, pair_L, part_L = (values_L.cpu().numpy() for values_L in structure)
    part = replace(
        row,
        input_ids_L=of(row.input_ids_L, 0),
        position_ids_L=structure[0],
        pair_L=structure[1],
        part_L=structure[2],
        blocks=layout.blocks(position_ids_L, pair_L, part_L, device),
        sources_T=new_L[row.sources_T[targets_T]],
        targets_T=row.targets_T[targets_T],
        lengths=tuple(row.lengths[number] for number in numbers),
        tokens=len(kept),
    )
    return part, targets_T


def unknown_scaling(model: nn.Module) -> str | None:
    """The class of a rotary embedding whose values depend on length in a way that is not known here; None for none.

    The embeddings are asked for the second position of sequences of many lengths, which costs nothing.
    """
    known = {scaling.module for scaling in _scalings(model)}
    for module in model.modules():
        if "Rotary" not in type(module).__name__ or module in known:
            continue
        weight = next(model.parameters())
        longest = getattr(getattr(module, "config", None), "max_position_embeddings", 64)
        values = []
        for length in sorted({*_LENGTHS, longest, longest + 1}):
            positions = torch.tensor([[0, 1, length - 1]], device=weight.device)
            try:
                found = module(weight.new_zeros(1, 3, 8), positions)
            except Exception:  # noqa: BLE001 (it has another form, which is tried with the whole model)
                break
            values.append([part[0, 1] for part in found if isinstance(part, Tensor) and part.ndim == 3])
        if any(not torch.equal(a, b) for later in values for a, b in zip(later, values[0], strict=True)):
            return type(module).__name__
    return None
