"""Model FLOPs utilisation (MFU): how near training and stage one come to the device's rate.

In: a model, or its shape, and pairs. Out: the FLOPs of a pair; the device's measured rate of matrix products; seconds a
pair of `fpo align` and `fpo precompute`; their utilisation; and the time for all of UltraFeedback at that pace.

The count takes the tokens of packed pairs without padding, the forward pass and the two products of its backward. What
checkpointing and the head recompute is not useful work and lowers the utilisation.

    python -m benchmarks.limit --dataset PAIRS
"""

import dataclasses
from typing import Any

import torch

from .contestants import CONTESTANTS
from .measuring import Result, in_fresh_process, in_turn
from .prepare import prepared
from .reporting import parser_of, report, workplace
from .setting import Setting, add_options, setting_of
from .shapes import ULTRAFEEDBACK, body_parameters, configuration, head_flops, layer_flops, measured_rate
from .stage_one import TITLES, score
from .training_step import run

# A training step is a forward pass, and a backward with two products for each product of the forward.
TRAINING_PASSES = 3


def main() -> None:
    """Measures the device, training and stage one, and reports."""
    parser = parser_of(__doc__, "limit")
    add_options(parser)
    parser.add_argument("--repeats", type=int, default=1)
    ours = [name for name, contestant in CONTESTANTS.items() if not contestant.trl]
    parser.add_argument("--contestants", nargs="*", default=["fpo", "fpo-ckpt"], choices=ours)
    options = parser.parse_args()
    setting, config = setting_of(options), configuration(options.model)
    with workplace() as folder:
        pairs = prepared(setting, folder)

        def measure(name: str) -> Result:
            if name == "stage one":
                return in_fresh_process(score, setting=setting, folder=folder, name="fpo")
            return run(setting, folder, name)

        rate = in_fresh_process(rate_of, device=setting.device, recipe=setting.recipe)["rate"]
        results = in_turn([*options.contestants, "stage one"], options.repeats, measure)
    tables = {
        "Arithmetic": arithmetic(config, setting.width),
        "Utilisation": utilisation(results, pair_flops(config, pairs["measured"], setting), rate),
        "The pairs": [{"": name, **row} for name, row in pairs.items()],
    }
    report(options, tables, setting={**dataclasses.asdict(setting), "dataset": None}, rate=rate, runs=results)


def rate_of(device: str, recipe: str) -> Result:
    """FLOP/s of a matrix product in the recipe's precision."""
    return {"rate": measured_rate(device, torch.bfloat16 if recipe == "bf16" else torch.float32)}


def pair_flops(config: Any, pairs: Result, setting: Setting) -> dict[str, float]:
    """FLOPs of one pair: the forward pass of the model, and one encoding of the responses by the SAE."""
    answered = 2 * pairs["response"]
    forward = layer_flops(config, pairs["packed"], pairs["attended"]) + head_flops(config, answered)
    return {"model": forward, "sae": 2 * config.get_text_config().hidden_size * setting.width * answered}


def arithmetic(config: Any, width: int) -> list[Result]:
    """The parts of a token's FLOPs."""
    context, parameters, text = 1024, body_parameters(config), config.get_text_config()
    body, head = layer_flops(config, 1, 0), head_flops(config, 1)
    attention = layer_flops(config, 0, context / 2)
    sae = 2.0 * text.hidden_size * width
    return [
        {"of a token, forward": "body", "parameters": parameters, "GFLOP": body / 1e9},
        {"of a token, forward": "head", "parameters": text.vocab_size * text.hidden_size, "GFLOP": head / 1e9},
        {"of a token, forward": f"attention, mean of {context} positions", "parameters": 0, "GFLOP": attention / 1e9},
        {"of a token, forward": f"SAE of {width:,}", "parameters": text.hidden_size * width, "GFLOP": sae / 1e9},
    ]


def utilisation(results: dict[str, Result], flops: dict[str, float], rate: float) -> list[Result]:
    """One row a measurement."""
    made = []
    for name, result in results.items():
        title = TITLES["fpo"] if name == "stage one" else CONTESTANTS[name].title
        if "failed" in result:
            made.append({"": title, "pairs a second": result["failed"]})
            continue
        seconds = result["seconds_a_pair"]
        reads_features = name == "stage one" or CONTESTANTS[name].method == "fpo"
        passes = 1 if name == "stage one" else TRAINING_PASSES
        useful = passes * flops["model"] + (flops["sae"] if reads_features else 0)
        made.append(
            {
                "": title,
                "pairs a second": 1 / seconds,
                "TFLOP a pair": useful / 1e12,
                "TFLOP/s": useful / seconds / 1e12,
                "of the device's, %": 100 * useful / seconds / rate,
                f"hours for {ULTRAFEEDBACK:,} pairs": seconds * ULTRAFEEDBACK / 3600,
                "cores busy": result["cores_busy"],
                "tensors, GB": result["tensor_bytes"] / 1e9,
            }
        )
    return made


if __name__ == "__main__":
    main()
