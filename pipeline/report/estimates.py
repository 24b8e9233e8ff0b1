"""What a plan will take, before anything of it exists: per step what it reads and writes, memory, disk, time.

In: steps. Out: a `PlanEstimate`, and a table of it on the terminal. Parameters, FLOPs and files are counted; how fast
the device is and how long texts are is measured where it can be, else assumed, which is said.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from ...stages.train.methods import METHODS
from ..commands.inputs import device_of
from ..progress import console
from .amounts import Data, data_of
from .costs import ASSUMED_WIDTH, COSTS, Cost, Task
from .jobs import Step
from .rates import Rates, rates_of
from .shapes import shape_of

# Columns of the table, on a terminal at most and in a log.
WIDEST, LOG_WIDTH = 120, 110

# Names from this length on are shown by their last part.
LONG = 28


@dataclass(frozen=True)
class StepEstimate:
    """One step with what it takes; nothing if it is done.

    Attributes:
        step: the step.
        reads: labels of the steps that it stands on, hub ids, paths.
        cost: memory, disk and time.
        data: what it goes over once; None if it is done.
    """

    step: Step
    reads: tuple[str, ...]
    cost: Cost = field(default_factory=Cost)
    data: Data | None = None

    @property
    def done(self) -> bool:
        """Whether there was nothing left of it to do."""
        return self.data is None


@dataclass(frozen=True)
class PlanEstimate:
    """What all steps take.

    Attributes:
        steps: in their order.
        jobs: how many run at a time.
        rates: of the device.
    """

    steps: tuple[StepEstimate, ...]
    jobs: int
    rates: Rates

    @property
    def todo(self) -> tuple[StepEstimate, ...]:
        """Those that are not done."""
        return tuple(one for one in self.steps if not one.done)

    @property
    def memory(self) -> float:
        """Peak memory of the device, bytes: the largest step, times those that run together."""
        largest = max((one.cost.memory for one in self.todo), default=0.0)
        return largest * min(self.jobs, len(self.todo))

    @property
    def disk(self) -> float:
        """What will be written, bytes."""
        return sum(one.cost.disk for one in self.todo)

    @property
    def seconds(self) -> float:
        """Time of all steps: a GPU is shared by those that run together, CPU cores are divided among them."""
        return sum(one.cost.seconds for one in self.todo) / (1 if self.rates.cuda else self.jobs)

    @property
    def assumptions(self) -> list[str]:
        """What the figures rest on, one line each."""
        rates = self.rates
        lines = [
            f"{rates.name}; of that {rates.training:.0%} in training and {rates.inference:.0%} otherwise, assumed",
            "loading, tokenising and saving take time besides; a sampled answer is counted with its greatest length",
        ]
        for one in self.todo:
            config, data = one.step.config, one.data
            if data and one.step.command in ("precompute", "sft", "train-sae"):
                prompt, answer = (
                    ("prompt", "response") if data.sides == 2 else ("turns of the user", "of the assistant")
                )
                lines.append(
                    f"{config.dataset}, {config.split}: {data.count:,.0f} rows, {prompt} {data.prompt:.0f}, {answer} "
                    f"{data.response:.0f} tokens ({data.origin})"
                )
        return list(dict.fromkeys(lines))


def estimate_plan(steps: Sequence[Step], jobs: int) -> PlanEstimate:
    """What steps take, those that are done nothing.

    Args:
        steps: the steps; what a step needs is among them or there.
        jobs: how many run at a time.

    Raises:
        FileNotFoundError: if a step reads local files that are not there and that no step writes.
        ValueError: if a model's configuration or local data cannot be had, or there is no such device.
    """
    makers = {step.out: step for step in steps}
    todo = [step for step in steps if not step.done]
    devices = {device_of(step.config) for step in todo} or {"cpu"}
    rates = {device: rates_of(device, jobs) for device in sorted(devices, reverse=True)}  # a GPU's first
    names = {step.out: base_model(step, makers) for step in todo}
    shapes = {name: shape_of(name) for name in sorted(set(names.values()))}
    estimates = []
    for step in steps:
        if step.done:
            estimates.append(StepEstimate(step, _reads(step, makers)))
            continue
        data = data_of(step, makers)
        device = rates[device_of(step.config)]
        task = Task(step.config, shapes[names[step.out]], data, _widths(step, makers), device)
        estimates.append(StepEstimate(step, _reads(step, makers), COSTS[step.command](task), data))
    return PlanEstimate(tuple(estimates), jobs, next(iter(rates.values())))


def maker_of(name: str, makers: Mapping[Path, Step]) -> Step | None:
    """The step that writes a folder, or the one that it lies in (snapshots)."""
    path = Path(name)
    return next((makers[folder] for folder in (path, *path.parents) if folder in makers), None)


def base_model(step: Step, makers: Mapping[Path, Step]) -> str:
    """The model that a step's model was trained from: no other step writes it."""
    assert step.config.model is not None
    maker = maker_of(step.config.model, makers)
    return step.config.model if maker is None else base_model(maker, makers)


def loads_saes(step: Step) -> bool:
    """Whether a step loads the SAEs that its configuration names."""
    if step.command == "align":
        return METHODS[step.config.method].divergence == "features"
    return step.command in ("precompute", "evaluate")


def _width(spec: str, makers: Mapping[Path, Step]) -> int:
    """From the step that trains it, its folder or its name (`width_16k` is 2^14); else the common one."""
    if (maker := maker_of(spec, makers)) is not None:
        return maker.config.width
    settings = Path(spec.rpartition("@")[0] or spec) / "cfg.json"
    if settings.is_file():
        return int(json.loads(settings.read_text())["d_sae"])
    if match := re.search(r"width_(\d+)(k|m)", spec):
        return int(2 ** round(math.log2(int(match[1]) * {"k": 1e3, "m": 1e6}[match[2]])))
    return ASSUMED_WIDTH


def _widths(step: Step, makers: Mapping[Path, Step]) -> tuple[int, ...]:
    """Features of each SAE that a step loads."""
    return tuple(_width(spec, makers) for spec in step.config.sae) if loads_saes(step) else ()


def _reads(step: Step, makers: Mapping[Path, Step]) -> tuple[str, ...]:
    config = step.config
    names = [config.model, config.reference]
    names += [str(config.cache)] if step.command in ("align", "evaluate") else [config.dataset]
    found = []
    for name in names:
        if name is not None:
            maker = maker_of(name, makers)
            found.append(_shortened(name) if maker is None else _label(maker).replace("precompute", "cache"))
    if number := len(_widths(step, makers)):
        found.append("1 SAE" if number == 1 else f"{number} SAEs")
    return tuple(dict.fromkeys(found))


def _shortened(name: str) -> str:
    """A long path or a data set's name by its end."""
    parts = Path(name).parts
    return name if len(name) < LONG else str(Path("…", parts[-1]))


def print_plan(estimate: PlanEstimate) -> None:
    """Prints a line for each group of steps that differ in the seed (or the snapshot) alone, totals and assumptions."""
    runs = estimate.steps[-1].step.out.parent  # before them may stand those that make the embedded world
    table = Table(title=f"Folders of {runs}", title_justify="left", box=SIMPLE_HEAD, show_edge=False)
    table.add_column("step", overflow="fold", ratio=5)
    table.add_column("reads", overflow="fold", ratio=6)
    table.add_column("writes", overflow="ellipsis", no_wrap=True, width=24)
    for heading in ("memory", "disk", "time"):
        table.add_column(heading, justify="right", no_wrap=True, min_width=8)
    groups: dict[str, list[StepEstimate]] = {}
    for one in estimate.steps:
        groups.setdefault(_label(one.step), []).append(one)
    for label, group in groups.items():
        table.add_row(*_line(label, group))
    table.add_section()
    table.add_row(
        f"{len(estimate.todo)} to do, {len(estimate.steps) - len(estimate.todo)} done",
        f"{estimate.jobs} at a time",
        "",
        decimal(round(estimate.memory)),
        decimal(round(estimate.disk)),
        duration(estimate.seconds),
    )
    width = min(WIDEST, console.width) if console.is_terminal else LOG_WIDTH
    wide = Console(width=width, highlight=False, markup=False)
    wide.print(table)
    for line in estimate.assumptions:
        wide.print(line)


def _line(label: str, group: Sequence[StepEstimate]) -> tuple[str, ...]:
    todo = [one for one in group if not one.done]
    number = f" ×{len(group)}" if len(group) > 1 else ""
    reads = ", ".join(dict.fromkeys(name for one in group for name in one.reads))
    writes = re.sub(r"(-seed-\d+.*)?-[0-9a-f]+$", "-…", group[0].step.out.name)
    if not todo:
        return f"{label}{number}", reads, writes, "", "", "done"
    some = f" ({len(group) - len(todo)} done)" if len(todo) < len(group) else ""
    return (
        f"{label}{number}{some}",
        reads,
        writes,
        decimal(round(max(one.cost.memory for one in todo))),
        decimal(round(sum(one.cost.disk for one in todo))),
        duration(sum(one.cost.seconds for one in todo)),
    )


def _label(step: Step) -> str:
    """A step's label without its seed and snapshot, sites in short."""
    label = re.sub(r", (seed \d+|step-\d+)", "", step.label)
    label = re.sub(r"blocks\.(\d+)\.hook_(\w+)", r"\1 \2", label)
    return step.command if label == f"{step.command} {step.command}" else label


def duration(seconds: float) -> str:
    """Time in the unit that a person would say it in."""
    for unit, size in (("days", 2 * 86_400), ("h", 2 * 3600), ("min", 90)):
        if seconds >= size:
            return f"{seconds / {'days': 86_400, 'h': 3600, 'min': 60}[unit]:.1f} {unit}"
    return f"{seconds:.0f} s"
