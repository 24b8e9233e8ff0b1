"""Peak memory of training: of tensors, and of the process that holds them. The comparison and benchmarks ask for it.

In: a training. Out: the most bytes of tensors that were alive at once. A GPU's allocator counts them. On a CPU they are
counted here, operation by operation, in the first two steps, the second of which holds all that later ones hold. The
process's own peak is measured too, but in a small run it is that of its imports.
"""

import gc
import resource
import sys
import weakref
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_map_only
from transformers import TrainerCallback

COUNTED_STEPS = 2


class TensorBytes(TorchDispatchMode):
    """Counts the bytes of all tensor storages that are alive, and their peak, while it is on.

    A storage counts once, whatever views there are of it, from the operation that returns it until nothing refers to
    it; what is there on entry counts too. What an operation takes and frees inside itself is not seen.

    Attributes:
        live: bytes now.
        peak: the most since the mode was made or `reset`.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._counted: set[int] = set()

    def __enter__(self) -> "TensorBytes":
        for thing in gc.get_objects():
            if issubclass(type(thing), torch.Tensor):  # isinstance would wake up lazy objects of other libraries
                self._count(thing)
        return super().__enter__()  # type: ignore[no-any-return, no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation and counts what it returns."""
        result = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self._count, result)
        return result

    def reset(self) -> None:
        """Lets the peak begin anew."""
        self.peak = self.live

    def _count(self, tensor: torch.Tensor) -> None:
        # Of wrappers the tensors inside are seen too; a compiler's fakes have no bytes, and sizes that may be symbols.
        if tensor.device.type == "meta" or is_traceable_wrapper_subclass(tensor) or isinstance(tensor, FakeTensor):
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._counted:
            self._counted.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._counted.discard(key)
        self.live -= size


def resident_bytes() -> int:
    """The most memory that this process has held so far, all of it counted."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class PeakMemory(TrainerCallback):
    """A callback that measures the peak of a training's tensors; the trainer logs it with the run's cost."""

    def __init__(self) -> None:
        self._peak, self._steps = 0, 0
        self._mode: TensorBytes | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begins to count, in the first steps on a CPU."""
        if args.device.type == "cpu" and self._steps < COUNTED_STEPS:
            self._mode = TensorBytes()
            self._mode.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Counts no more."""
        self._steps += 1
        self.stop()

    def stop(self) -> None:
        """Counts no more, also where a step ended in an error."""
        if self._mode is not None:
            self._mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            self._peak, self._mode = max(self._peak, self._mode.peak), None

    def read(self, device: torch.device) -> dict[str, int]:
        """The peak of tensors on the device and of the process, bytes, under the names of the log."""
        tensors = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else self._peak
        return {"train_peak_memory_bytes": tensors, "train_peak_process_bytes": resident_bytes()}
