"""Whether a GPU computes what it should, and how fast: one process, under four minutes on one card.

In: a card. Out: figures, each printed and appended to `gpu_check.jsonl` as soon as it is measured, so that a run that
is cut short loses nothing. The sections, in order of importance:
- `card`: versions, and the measured rates of bf16 matrix products and of copies;
- `values`: compiled against eager attention, log-probs and gradients, fp32 and bf16, tiny Gemma-2, Gemma-3 and Llama;
- `runs`: 12 steps of each kind of method, past two logs and a checkpoint, and a resumed run;
- `stage_one`, `train`: the shape of Gemma-2-2B at its steady rate, compilation and warm-up timed apart;
- `profile`: where the time of a row and of a training step goes.

    python -m benchmarks.gpu_check --out DIR
"""

import argparse
import dataclasses
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from fpo.stages.model import flex
from fpo.stages.model.models import Recipe
from fpo.stages.train import memory

from . import gpu_speed, gpu_values
from .gpu_bench import LARGE, TINY, Bench, Report
from .reporting import workplace

SECTIONS = ("card", "values", "runs", "stage_one", "train", "profile")


def main() -> None:
    """Runs the chosen sections."""
    options = parser().parse_args()
    tiny = options.tiny
    if options.device == "cpu":
        run_on_cpu()
    with workplace() as folder:
        given = {name: value for name in ("batch", "steps") if (value := getattr(options, name))}
        # On CPUs without instructions for it bf16 takes minutes.
        recipe: Recipe = "bf16" if options.device == "cuda" else "fp32"
        large = dataclasses.replace(TINY if tiny else LARGE, device=options.device, recipe=recipe, **given)
        report = Report(options.out)
        bench = Bench(report, folder, options.device, large, options.compile)
        sections: dict[str, Callable[[], None]] = {
            "card": lambda: gpu_values.card(bench),
            "values": lambda: gpu_values.values(bench),
            "runs": lambda: gpu_values.runs(bench),
            "stage_one": lambda: gpu_speed.stage_one(bench, options.pairs),
            "train": lambda: gpu_speed.train(bench, options.methods, options.checkpointing),
            "profile": lambda: gpu_speed.profiles(bench),
        }
        for name in options.sections:
            started = report.seconds
            try:
                sections[name]()
            except Exception as error:  # noqa: BLE001 (the next section may work)
                traceback.print_exc()
                report.add(name, failed=f"{type(error).__name__}: {str(error)[:500]}")
            report.add(name, seconds=round(report.seconds - started, 1), compilations=bench.compilations())
            if options.seconds and report.seconds > options.seconds:
                report.add("end", after=name, reason="out of time")
                break


def parser() -> argparse.ArgumentParser:
    """The command line of `gpu_check`."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = made.add_argument
    add("--out", type=Path, default=Path("results/benchmarks/gpu_check"), help="folder of gpu_check.jsonl")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    add("--tiny", action="store_true", help="a tiny model in place of Gemma-2-2B, to see whether it runs at all")
    add("--sections", nargs="+", default=SECTIONS, choices=SECTIONS)
    add("--pairs", type=int, default=96, help="pairs that stage one is timed on, twice")
    add("--batch", type=int, help="pairs of a training step")
    add("--steps", type=int, help="timed training steps")
    add("--methods", nargs="+", default=["fpo", "simpo"], help="methods that are timed")
    add("--checkpointing", type=int, default=0, help="checkpoint every n-th layer; 0 for none")
    add("--compile", action=argparse.BooleanOptionalAction, default=True, help="compile the layers too")
    add("--seconds", type=float, default=0, help="start no section after this time; 0 for no limit")
    return made


def run_on_cpu() -> None:
    """Runs compiled attention by torch's plain operations where there is no GPU, to try this script."""
    from torch.nn.attention import flex_attention

    flex.BACKEND = "aot_eager"
    flex_attention._validate_device = lambda query, key, value: None
    memory.COUNTED_STEPS = 0


if __name__ == "__main__":
    main()
