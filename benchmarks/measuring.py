"""The ground of every benchmark: fresh processes, peak memory, repetitions in turn.

In: functions that measure something. Out: medians of their results.
"""

import gc
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch
from fpo.stages.train.memory import TensorBytes, resident_bytes

Result = dict[str, Any]


class Meter:
    """Measures time and peak memory between two points of a process, on the CPU or a GPU.

    On a CPU `TensorBytes` counts the tensors, at some microseconds an operation. On a GPU the allocator gives the peak.
    Resident memory is the whole process's.
    """

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self._bytes = TensorBytes()

    def __enter__(self) -> "Meter":
        if self.device.type == "cpu":
            self._bytes.__enter__()
        self.reset()
        return self

    def __exit__(self, *exception: Any) -> None:
        if self.device.type == "cpu":
            self._bytes.__exit__(*exception)  # type: ignore[no-untyped-call]

    def reset(self) -> None:
        """Restarts the clock and the peak; tensors that are alive stay counted."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self._bytes.reset()
        self.start = self.live
        self._started, self._computed = self.now(), time.process_time()

    def now(self) -> float:
        """The clock, in seconds, once the device has finished its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @property
    def live(self) -> int:
        """Bytes of the live tensors."""
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else self._bytes.live

    def read(self) -> Result:
        """Reads time and memory since `reset`.

        Returns:
            `seconds`; `cores_busy`, below the number of threads where other work interfered; `tensor_bytes`, the peak;
            `extra_bytes`, the peak minus the bytes at `reset`; `resident_bytes`, the peak since the process began.
        """
        seconds, computed = self.now() - self._started, time.process_time() - self._computed
        cuda = self.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(self.device) if cuda else self._bytes.peak
        return {
            "seconds": seconds,
            "cores_busy": computed / seconds,
            "tensor_bytes": peak,
            "extra_bytes": peak - self.start,
            "resident_bytes": resident_bytes(),
        }


def measured(device: str, work: Callable[[], Any], repeats: int = 3) -> Result:
    """Runs `work` once to warm up, then `repeats` times: median seconds, and the memory of the last run."""
    work()
    with Meter(device) as meter:
        runs = []
        for _ in range(repeats):
            gc.collect()
            meter.reset()
            work()
            runs.append(meter.read())
    return runs[-1] | {"seconds": statistics.median(run["seconds"] for run in runs)}


def in_fresh_process(function: Callable[..., Result], **arguments: Any) -> Result:
    """Calls a module's function in a new process and returns its result.

    A process that runs out of memory is a finding, not an error: the result is then `{"failed": reason}`. Whatever else
    the function raises is raised here.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(function, **arguments).result()
        except torch.OutOfMemoryError as error:
            return {"failed": f"out of memory: {str(error).splitlines()[0][:200]}"}
        except BrokenProcessPool:
            return {"failed": "the process died, as it does when memory runs out"}


def in_turn(names: Iterable[str], repeats: int, measure: Callable[[str], Result]) -> dict[str, Result]:
    """Measures all names, then all again, so that a slow minute of the machine affects all of them.

    Returns:
        For each name the medians of its measurements, and the measurements themselves under `runs`.
    """
    runs: dict[str, list[Result]] = {name: [] for name in names}
    for repeat in range(repeats):
        for name, results in runs.items():
            results.append(measure(name))
            print(f"{repeat + 1} of {repeats}, {name}: {json.dumps(results[-1])[:200]}", file=sys.stderr, flush=True)
    return {name: medians(results) | {"runs": results} for name, results in runs.items()}


def medians(results: Sequence[Result]) -> Result:
    """The median of each number; if one run failed, its failure."""
    if failed := next((result for result in results if "failed" in result), None):
        return dict(failed)
    numbers = {key for key, value in results[0].items() if isinstance(value, int | float)}
    return {key: statistics.median(result[key] for result in results) for key in sorted(numbers)}
