"""Rotary frequencies that depend on the length of a sequence, for rows that hold sequences of several lengths.

In: a packed row and a model. Out: the row itself, or one row for each set of frequencies that its sequences need. Under
`dynamic` scaling each length above that of pre-training has its own set; under `longrope` there are two.

Shapes: L positions of a row, T response tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .masks import sequences_of
from .packing import PADDING, PackedRow, RowLayout, padded

# Unknown rotary embeddings are tried at these lengths, and on either side of the configuration's longest.
_LENGTHS = (64, 1024, 4097, 8193, 32769, 131073, 1048577)


@dataclass(frozen=True, eq=False)
class _Scaling:
    """A rotary embedding, or its part for one kind of layer, whose frequencies depend on length.

    Attributes:
        module: the embedding.
        prefix: prefix of its attributes for that kind of layer.
        dynamic: whether the frequencies change with every length above the threshold; else they change once, at it.
        threshold: length of the longest sequence that has the frequencies of pre-training.
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
    """Makes a model with `dynamic` scaling forget its longest sequence, so that it scores as a fresh model does."""
    for scaling in _scalings(model):
        if scaling.dynamic:
            module, name = scaling.module, f"{scaling.prefix}inv_freq"
            original = getattr(module, f"{scaling.prefix}original_inv_freq")
            module.register_buffer(name, original.to(getattr(module, name).device), persistent=False)
            setattr(module, f"{scaling.prefix}max_seq_len_cached", scaling.threshold)


def frequencies_of(model: nn.Module, length: int) -> tuple[int, ...]:
    """A key of the frequencies at a length: two lengths with equal keys have the same frequencies."""
    return tuple(
        max(length, scaling.threshold) if scaling.dynamic else int(length > scaling.threshold)
        for scaling in _scalings(model)
    )


def of_same_frequencies(model: nn.Module, row: PackedRow, layout: RowLayout) -> list[tuple[PackedRow, Tensor]]:
    """Splits a row into rows with one set of rotary frequencies each, where its sequences need several.

    Args:
        model: the decoder, or a module around it.
        row: the packed row.
        layout: the row's layout.

    Returns:
        Rows, each with the indices (int64) of the targets of `row` that it predicts: `row` itself, or several. A pair
        whose responses need different frequencies is in two rows, its prompt in both.
    """
    whole = [(row, torch.arange(len(row.targets_T), device=row.targets_T.device))]
    if not _scalings(model):
        return whole
    sequences = sequences_of(row)[: len(row.lengths)]  # the rest is padding
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, ranges in enumerate(sequences):
        groups.setdefault(frequencies_of(model, sum(map(len, ranges))), []).append(number)
    if len(groups) == 1:
        return whole
    return [_part(row, sequences, numbers, layout) for numbers in groups.values()]


def _part(
    row: PackedRow, sequences: list[list[range]], numbers: list[int], layout: RowLayout
) -> tuple[PackedRow, Tensor]:
    """The row of some of a row's sequences, and the indices of its targets in `row`."""
    device = row.input_ids_L.device
    kept = sorted({position for number in numbers for part in sequences[number] for position in part})
    kept_L = torch.tensor(kept, device=device)
    new_L = torch.full_like(row.input_ids_L, PADDING)
    new_L[kept_L] = torch.arange(len(kept), device=device)
    response_T = torch.repeat_interleave(torch.tensor(row.lengths, device=device))
    targets_T = torch.isin(response_T, torch.tensor(numbers, device=device)).nonzero().squeeze(1)
    part = replace(
        row,
        input_ids_L=row.input_ids_L[kept_L],
        position_ids_L=row.position_ids_L[kept_L],
        pair_L=row.pair_L[kept_L],
        part_L=row.part_L[kept_L],
        sources_T=new_L[row.sources_T[targets_T]],
        targets_T=row.targets_T[targets_T],
        lengths=tuple(row.lengths[number] for number in numbers),
        tokens=len(kept),
    )
    return padded(part, layout), targets_T


def unknown_scaling(model: nn.Module) -> str | None:
    """The class of a rotary embedding that depends on length in an unknown way; None for none.

    Such an embedding gives the second position other values in some lengths of sequence than in others.
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
            except Exception:  # noqa: BLE001 (it takes other arguments: the trial of the whole model judges it)
                break
            values.append([part[0, 1] for part in found if isinstance(part, Tensor) and part.ndim == 3])
        if any(not torch.equal(a, b) for later in values for a, b in zip(later, values[0], strict=True)):
            return type(module).__name__
    return None
