"""Numbers that are on their way from a device to the host.

In: tensors on a device. Out: the same on the host, when they are asked for: one copy for all of them, into pinned
memory, that nothing waits for in between.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


class HostCopy:
    """Tensors of 4 or 8 bytes an entry, copied to the host while the device goes on."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        """Starts the copy."""
        # Those of 8 bytes an entry first, so that each begins where its dtype may.
        self._order = sorted(range(len(tensors)), key=lambda number: -tensors[number].element_size())
        self._kinds = [(tensors[number].dtype, tensors[number].shape) for number in self._order]
        flat = torch.cat([tensors[number].contiguous().flatten().view(torch.int32) for number in self._order])
        self._done: torch.cuda.Event | None = None
        self._buffer = flat
        if flat.device.type == "cuda":
            self._buffer = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True)
            self._buffer.copy_(flat, non_blocking=True)
            self._done = torch.cuda.Event()
            self._done.record(torch.cuda.current_stream(flat.device))

    def read(self) -> list[Tensor]:
        """The tensors, on the host; waits for the copy, not for what the device was given after it."""
        if self._done is not None:
            self._done.synchronize()
        found: dict[int, Tensor] = {}
        start = 0
        for number, (dtype, shape) in zip(self._order, self._kinds, strict=True):
            stop = start + shape.numel() * dtype.itemsize // 4
            found[number] = self._buffer[start:stop].view(dtype).view(shape)
            start = stop
        return [found[number] for number in range(len(found))]
