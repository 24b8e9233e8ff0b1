"""A training step of `fpo align` against one of TRL: the same token ids, model, precision and batch.

In: preference pairs and a model. Out: pairs a second and peak memory of every contestant, and their ratios to the
first. Each run is a process of its own; contestants run in turn. Loading, the parity check, TRL's precomputed pass and
the warm-up steps are not counted. TRL checkpoints activations by default and `fpo align` does not; each runs both ways.

    python -m benchmarks.training_step --dataset PAIRS
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from . import contestants
from .contestants import CONTESTANTS
from .measuring import Result, in_fresh_process, in_turn
from .prepare import prepared
from .reporting import parser_of, report, workplace
from .setting import Setting, add_options, setting_of

DEFAULT = (
    *("fpo", "simpo", "dpo", "tdpo2", "fpo-ckpt"),
    *("trl-simpo-ckpt", "trl-simpo", "trl-dpo-precomputed-ckpt", "trl-dpo-precomputed", "trl-dpo-ckpt"),
)


def main() -> None:
    """Runs the contestants and reports."""
    parser = parser_of(__doc__, "training_step")
    add_options(parser)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--contestants", nargs="+", default=DEFAULT, choices=CONTESTANTS)
    options = parser.parse_args()
    setting = setting_of(options)
    with workplace() as folder:
        pairs = prepared(setting, folder)
        results = in_turn(options.contestants, options.repeats, lambda name: run(setting, folder, name))
    titles = {name: contestant.title for name, contestant in CONTESTANTS.items()}
    tables = {"A training step": rows(results, titles), "The pairs": [{"": name, **row} for name, row in pairs.items()]}
    report(options, tables, setting={**dataclasses.asdict(setting), "dataset": None}, runs=results)


def run(setting: Setting, folder: Path, name: str) -> Result:
    """Runs one contestant in a new process; halves the batch for as long as memory runs out."""
    while True:
        result = in_fresh_process(contestants.train, setting=setting, folder=folder, name=name)
        if "memory" not in str(result.get("failed")) or setting.batch % 2:
            return result | {"batch": setting.batch}
        # The pairs of warm-up and measurement stay the same.
        batch, warmup, steps = setting.batch // 2, 2 * setting.warmup, 2 * setting.steps
        setting = dataclasses.replace(setting, batch=batch, warmup=warmup, steps=steps)


def rows(results: Mapping[str, Result], titles: Mapping[str, str]) -> list[Result]:
    """The table; ratios are to the first result."""
    first = next(iter(results.values()))
    made = []
    for name, result in results.items():
        row: Result = {"": titles[name], "_name": name}
        if "failed" in result:
            made.append(row | {"seconds a pair": result["failed"]})
            continue
        row |= {
            "seconds a pair": result["seconds_a_pair"],
            "pairs a second": 1 / result["seconds_a_pair"],
            "time, ratio": result["seconds_a_pair"] / first["seconds_a_pair"],
            "cores busy": result["cores_busy"],
            "tensors, GB": result["tensor_bytes"] / 1e9,
            "ratio": result["tensor_bytes"] / first["tensor_bytes"],
            "resident, GB": result["resident_bytes"] / 1e9,
            "resident, ratio": result["resident_bytes"] / first["resident_bytes"],
        }
        made.append(row | ({"batch": result["batch"]} if "batch" in result else {}))
    return made


if __name__ == "__main__":
    main()
