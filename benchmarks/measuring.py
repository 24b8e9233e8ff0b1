"""What every benchmark stands on: fresh processes, peaks of memory, repetitions in turn.

In: functions that measure something, with arguments and results that JSON can say. Out: medians of their results.

    python -m benchmarks.measuring MODULE FUNCTION ARGUMENTS     # how `in_fresh_process` calls a function
"""

import gc
import importlib
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from fpo.stages.train.memory import TensorBytes, resident_bytes

Result = dict[str, Any]


class Meter:
    """Time and peak memory of parts of a process, on the CPU or a GPU.

    On a CPU tensors are counted by `TensorBytes`, which takes some microseconds an operation; resident memory is the
    whole process's. On a GPU the peak is the allocator's.
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
        """Lets the peak and the clock begin anew; what is alive now stays counted."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self._bytes.reset()
        self.start = self.live
        self._started, self._computed = self.now(), time.process_time()

    def now(self) -> float:
        """Seconds, after all that was started on the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @property
    def live(self) -> int:
        """Bytes of tensors that are alive."""
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else self._bytes.live

    def read(self) -> Result:
        """What there was since `reset`.

        Returns:
            `seconds`; `cores_busy`, fewer than the threads where other work disturbed it; `tensor_bytes`, their peak;
            `extra_bytes`, what of it was not there before; `resident_bytes`, the peak of the process's life.
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
    """Runs some work once to warm up, then several times: median seconds, and the last time's memory."""
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
    """Calls a function of a module in a process of its own and returns what it returned.

    Where memory did not suffice the result is `{"failed": reason}`: that is a finding too.

    Raises:
        RuntimeError: if it failed for another reason.
    """
    spec = sys.modules[function.__module__].__spec__
    assert spec is not None, "a benchmark runs as `python -m benchmarks.NAME`"
    command = [sys.executable, "-m", "benchmarks.measuring", spec.name, function.__name__, json.dumps(arguments)]
    environment = os.environ | {"TRL_EXPERIMENTAL_SILENCE": "1", "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode == -9:
        return {"failed": "killed, which is what happens when memory runs out"}
    if done.returncode:
        raise RuntimeError(f"{spec.name}.{function.__name__} failed:\n{done.stderr[-4000:]}")
    result: Result = json.loads(done.stdout.splitlines()[-1])
    return result


def in_turn(names: Iterable[str], repeats: int, measure: Callable[[str], Result]) -> dict[str, Result]:
    """Measures each name, then each again, so that a slow minute of the machine hits all alike.

    Returns:
        By name: the medians of what was measured, and `runs`.
    """
    runs: dict[str, list[Result]] = {name: [] for name in names}
    for repeat in range(repeats):
        for name, results in runs.items():
            results.append(measure(name))
            print(f"{repeat + 1} of {repeats}, {name}: {json.dumps(results[-1])[:200]}", file=sys.stderr, flush=True)
    return {name: medians(results) | {"runs": results} for name, results in runs.items()}


def medians(results: Sequence[Result]) -> Result:
    """The median of every number; a failure is a failure of all."""
    if failed := next((result for result in results if "failed" in result), None):
        return dict(failed)
    numbers = {key for key, value in results[0].items() if isinstance(value, int | float)}
    return {key: statistics.median(result[key] for result in results) for key in sorted(numbers)}


def main() -> None:
    """Calls a function as `in_fresh_process` asks and prints its result as the last line."""
    _, module, function, arguments = sys.argv
    try:
        result = getattr(importlib.import_module(module), function)(**json.loads(arguments))
    except torch.OutOfMemoryError as error:
        result = {"failed": f"out of memory: {str(error).splitlines()[0][:200]}"}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
