"""Where the time of a training step goes, by kind of work.

In: preference pairs and a model. Out: seconds and share of each kind, and the slowest operations. An operation's name
and the sizes of its operands give its kind: the head has the vocabulary's size, the SAE its width.

    python -m benchmarks.step_profile --dataset PAIRS
"""

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback

from .contestants import CONTESTANTS, our_trainer
from .measuring import Result, in_fresh_process
from .prepare import prepared
from .reporting import parser_of, report, workplace
from .setting import Setting, add_options, setting_of

PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::addmm_", "aten::matmul")
OPTIMISER = ("adam", "rmsprop", "optimizer", "foreach")
LISTED = 15  # operations


class Profiled(TrainerCallback):
    """Records the steps after the warm-up."""

    def __init__(self, setting: Setting) -> None:
        activities = [ProfilerActivity.CPU]
        if setting.device == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self.recorded = profile(activities=activities, record_shapes=True)
        self._first, self._last = setting.warmup, setting.warmup + setting.steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Starts or stops the profiler."""
        if state.global_step == self._first:
            self.recorded.start()
        elif state.global_step == self._last:
            self.recorded.stop()


def main() -> None:
    """Profiles a contestant's step and reports."""
    parser = parser_of(__doc__, "step_profile")
    add_options(parser)
    ours = [name for name, contestant in CONTESTANTS.items() if not contestant.trl]
    parser.add_argument("--contestant", default="fpo", choices=ours)
    options = parser.parse_args()
    setting = setting_of(options)
    with workplace() as folder:
        prepared(setting, folder)
        result = in_fresh_process(record, setting=setting, folder=folder, name=options.contestant)
    tables = {"Kinds": result["kinds"], "Operations": result["operations"]}
    report(options, tables, setting={**dataclasses.asdict(setting), "dataset": None})


def record(setting: Setting, folder: Path, name: str) -> Result:
    """Trains with a profiler on the measured steps."""
    trainer = our_trainer(setting, folder, CONTESTANTS[name])
    vocabulary = trainer.policy.get_output_embeddings().weight.shape[0]
    callback = Profiled(setting)
    trainer.add_callback(callback)
    trainer.train()
    kinds: Counter[str] = Counter()
    operations: Counter[str] = Counter()
    for event in callback.recorded.key_averages(group_by_input_shape=True):
        if event.device_type.name != "CPU":  # a kernel: its time counts for the operation that launched it
            continue
        seconds = (event.self_device_time_total if setting.device == "cuda" else event.self_cpu_time_total) / 1e6
        kind = kind_of(event.key, sizes_of(event.input_shapes), vocabulary, setting.width)
        kinds[kind] += seconds
        operations[f"{event.key} ({kind})"] += seconds
    total = sum(kinds.values())
    return {
        "kinds": [{"kind": kind, "s": spent, "%": 100 * spent / total} for kind, spent in kinds.most_common()],
        "operations": [
            {"operation": key, "s": spent, "%": 100 * spent / total} for key, spent in operations.most_common(LISTED)
        ],
    }


def sizes_of(shapes: Any) -> set[int]:
    """All sizes in the shapes of an operation's operands."""
    if isinstance(shapes, int):
        return {shapes}
    return set().union(*map(sizes_of, shapes)) if isinstance(shapes, list | tuple) else set()


def kind_of(name: str, sizes: set[int], vocabulary: int, width: int) -> str:
    """The kind of work that an operation does."""
    if any(word in name.lower() for word in OPTIMISER):
        return "optimiser, with the gradient's norm"
    product = name in PRODUCTS
    if vocabulary in sizes:
        return "head, products" if product else "head and embedding, the rest"
    if width in sizes:
        return "SAE, products" if product else "SAE, the rest"
    if "attention" in name or name == "aten::bmm":
        return "attention"
    return "body, products" if product else "body, the rest"


if __name__ == "__main__":
    main()
