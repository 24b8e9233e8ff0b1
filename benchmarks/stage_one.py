"""Stage one against two other ways to score pairs: the same token ids, model, precision and batch.

In: preference pairs and a model. Out: pairs a second and peak memory of `fpo precompute` (log-probs and features,
written as a shard), of TRL's precomputed pass (log-probs alone), and of the plain way: `model(...)` on padded batches,
all logits, `SAE.encode` of every token. Loading and tokenising are not counted, nor the second packing of a shard's
sample (4 of 1,024 pairs).

    python -m benchmarks.stage_one --dataset PAIRS
"""

import dataclasses
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from fpo.cache.schema import Pair
from fpo.stages.model.models import autocast
from fpo.stages.model.sae import capture_sites, load_sae
from fpo.stages.scoring.measure import measure_pairs
from fpo.stages.scoring.supported import freeze
from torch import Tensor

from .contestants import common, dpo_trainer, token_ids
from .measuring import Meter, Result, in_fresh_process, in_turn
from .prepare import cached_pairs, prepared, write_cache
from .reporting import parser_of, report, workplace
from .setting import KEPT, Setting, add_options, attention_of, load, setting_of
from .training_step import rows

# Scores pairs and returns the log-probs of the chosen responses.
Way = Callable[[Sequence[Pair]], list[float]]

TITLES = {
    "fpo": "`fpo precompute`: log-probs, features, shard",
    "trl": "TRL DPOTrainer's precomputed pass: log-probs",
    "plain": "`model(...)`, padded, and `SAE.encode`: log-probs, features",
}


def main() -> None:
    """Runs the three ways in turn and reports."""
    parser = parser_of(__doc__, "stage_one")
    add_options(parser)
    parser.add_argument("--repeats", type=int, default=1)
    options = parser.parse_args()
    setting = setting_of(options)
    with workplace() as folder:
        pairs = prepared(setting, folder)
        results = in_turn(
            TITLES,
            options.repeats,
            lambda name: in_fresh_process(score, setting=setting, folder=folder, name=name),
        )
    tables = {"Stage one": rows(results, TITLES), "The pairs": [{"": name, **row} for name, row in pairs.items()]}
    report(options, tables, setting={**dataclasses.asdict(setting), "dataset": None}, runs=results)


def score(setting: Setting, folder: Path, name: str) -> Result:
    """Scores the measured pairs in one way, after the warm-up pairs."""
    pairs = cached_pairs(folder)
    first = setting.warmup * setting.batch
    run = WAYS[name](setting, folder)
    with Meter(setting.device) as meter:
        run(pairs[:first])
        meter.reset()
        run(pairs[first:])
        result = meter.read()
    return result | {"seconds_a_pair": result["seconds"] / len(pairs[first:])}


def ours(setting: Setting, folder: Path) -> Way:
    """Measures pairs and writes them as a shard, as `fpo precompute` does."""
    model = load(setting, folder, attention_of(setting, folder))
    saes = [load_sae(str(folder / "sae"), device=setting.device)]
    freeze(model, setting.recipe, compiled=setting.device == "cuda", sites=[sae.site for sae in saes])

    def run(pairs: Sequence[Pair]) -> list[float]:
        measured = measure_pairs(
            model, pairs, saes, setting.recipe, token_budget=setting.token_budget, keep_features=KEPT
        )
        with tempfile.TemporaryDirectory() as out:
            write_cache(Path(out), measured, saes, setting, model)
        return [row.chosen.logp for row in measured]

    return run


def trl(setting: Setting, folder: Path) -> Way:
    """TRL's precomputed pass, which its trainer runs in its constructor."""
    model = load(setting, folder, None)
    settings = common(setting, folder) | {"gradient_checkpointing": False, "max_length": setting.max_length}
    trainer: Any = None

    def run(pairs: Sequence[Pair]) -> list[float]:
        nonlocal trainer
        if trainer is None:  # the constructor scores the warm-up pairs
            trainer = dpo_trainer(model, None, settings, pairs)
            return list(trainer.train_dataset["ref_chosen_logps"])
        scored = trainer._precompute_ref_logps(token_ids(pairs), "measured", setting.batch)
        return list(scored["ref_chosen_logps"])

    return run


def plain(setting: Setting, folder: Path) -> Way:
    """All logits of padded batches, and every feature of every token."""
    model = load(setting, folder, None)
    sae = load_sae(str(folder / "sae"), device=setting.device)

    @torch.no_grad()
    def score_batch(pairs: Sequence[Pair]) -> list[float]:
        ids_BL, mask_BL, answered_BL = padded_batch(pairs, setting.device)
        weights_BL = answered_BL[:, 1:].float()
        with capture_sites(model, [sae.site]) as captured, autocast(setting.recipe, setting.device):
            logits_BLV = model(input_ids=ids_BL, attention_mask=mask_BL, use_cache=False).logits[:, :-1]
        logps_BL = torch.log_softmax(logits_BLV.float(), dim=-1).gather(2, ids_BL[:, 1:, None]).squeeze(2)
        features_BLM = sae.sae.encode(captured[sae.site].float())[:, :-1]
        pooled_BM = torch.einsum("blm,bl->bm", features_BLM, weights_BL) / weights_BL.sum(1, keepdim=True)
        torch.topk(pooled_BM, min(KEPT, sae.width)).values.cpu()
        chosen: list[float] = (logps_BL * weights_BL).sum(1)[: len(pairs)].tolist()
        return chosen

    def run(pairs: Sequence[Pair]) -> list[float]:
        parts = [score_batch(pairs[start : start + setting.batch]) for start in range(0, len(pairs), setting.batch)]
        return [logp for part in parts for logp in part]

    return run


def padded_batch(pairs: Sequence[Pair], device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, attention mask and response mask, each int64 [2B, L]: the chosen sequences, then the rejected ones."""
    sides = [(pair.prompt_ids, getattr(pair, side)) for side in ("chosen_ids", "rejected_ids") for pair in pairs]
    longest = max(prompt.size + answer.size for prompt, answer in sides)
    ids_BL = torch.zeros(len(sides), longest, dtype=torch.int64)
    mask_BL, answered_BL = torch.zeros_like(ids_BL), torch.zeros_like(ids_BL)
    for number, (prompt, answer) in enumerate(sides):
        end = prompt.size + answer.size
        ids_BL[number, : prompt.size] = torch.from_numpy(prompt.astype("int64"))
        ids_BL[number, prompt.size : end] = torch.from_numpy(answer.astype("int64"))
        mask_BL[number, :end] = 1
        answered_BL[number, prompt.size : end] = 1
    return ids_BL.to(device), mask_BL.to(device), answered_BL.to(device)


WAYS: Mapping[str, Callable[[Setting, Path], Way]] = {"fpo": ours, "trl": trl, "plain": plain}


if __name__ == "__main__":
    main()
