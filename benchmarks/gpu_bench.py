"""The bench of `gpu_check`: its report, settings, models, caches and trainers.

In: an output folder and a device. Out: a `Bench`, which every section takes.
"""

import dataclasses
import gc
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from fpo.cache.reader import open_cache
from fpo.cache.schema import Pair
from fpo.stages.model.flex import FLEX
from fpo.stages.model.sae import SiteSAE, load_sae
from fpo.stages.scoring.measure import measure_pairs
from fpo.stages.train.align import FPOTrainer
from fpo.stages.train.config import FPOConfig
from fpo.stages.train.methods import METHODS
from torch._dynamo.utils import counters

from .contestants import common
from .prepare import write_cache
from .setting import KEPT, Setting, load, random_sae

# The shape of Gemma-2-2B and the lengths of UltraFeedback.
LARGE = Setting(
    model="google/gemma-2-2b",
    dataset=None,
    split="",
    prompt=185,
    response=330,
    max_length=2048,
    batch=32,
    steps=4,
    warmup=3,
    token_budget=4096,
    recipe="bf16",
    device="cuda",
    layer=25,
    width=16_384,
    optimizer="adamw_torch_fused",
)
TINY = dataclasses.replace(
    LARGE, layer=1, width=256, max_length=192, prompt=40, response=60, batch=4, warmup=1, token_budget=512
)


class Report:
    """Writes each figure as soon as it is measured, to the terminal and to `gpu_check.jsonl`."""

    def __init__(self, out: Path) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self._path, self._start = out / "gpu_check.jsonl", time.perf_counter()

    def add(self, section: str, **figures: Any) -> None:
        """Prints a line and appends it to the file, synced to disk."""
        line = {"at": round(time.perf_counter() - self._start, 1), "section": section, **figures}
        text = json.dumps(line, default=str)
        print(text, flush=True)
        with self._path.open("a") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())

    @property
    def seconds(self) -> float:
        """Seconds since the report was opened."""
        return time.perf_counter() - self._start


@dataclasses.dataclass
class Bench:
    """The bench that the sections share.

    Attributes:
        report: takes the figures.
        folder: holds models, SAEs, caches and runs.
        device: `cpu` or `cuda`.
        large: the setting of the timed sections.
        compiled: whether layers are compiled, besides attention.
        rate: FLOP/s of bf16 matrix products; 0 until measured.
    """

    report: Report
    folder: Path
    device: str
    large: Setting
    compiled: bool
    rate: float = 0.0

    @property
    def tiny(self) -> bool:
        """Whether this is a trial of the script, with a tiny model in place of the large one."""
        return self.large.width == TINY.width

    def now(self) -> float:
        """The clock, in seconds, once the device has finished its work."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def compilations(self) -> int:
        """Number of graphs that torch has compiled so far."""
        return int(counters["stats"]["unique_graphs"])

    def peak_gb(self) -> float:
        """Peak memory of tensors since `reset_peak`, GB; 0 on a CPU."""
        return round(torch.cuda.max_memory_allocated() / 1e9, 2) if self.device == "cuda" else 0.0

    def reset_peak(self) -> None:
        """Frees what an earlier section left, and restarts the peak."""
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def tiny_config(kind: str, head_dim: int) -> Any:
    """A model type with two layers and the heads of Gemma-2-2B; the first layer slides, except in a Llama."""
    from transformers import AutoConfig

    sizes: dict[str, Any] = {
        "vocab_size": 1024,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": head_dim,
        "tie_word_embeddings": True,
    }
    if kind != "llama":
        sizes |= {"sliding_window": 64, "query_pre_attn_scalar": head_dim}
        sizes |= {"layer_types": ["sliding_attention", "full_attention"]}
    return AutoConfig.for_model(kind, **sizes)


def make_sae(folder: Path, config: Any, setting: Setting) -> SiteSAE:
    """A random SAE at the setting's site, loaded from the folder; the first call saves it there."""
    if not (folder / "sae").exists():
        random_sae(config.hidden_size, setting.width, setting.site).save_model(folder / "sae")
    return load_sae(str(folder / "sae"), device=setting.device)


def make_cache(folder: Path, model: Any, pairs: list[Pair], sae: SiteSAE, setting: Setting) -> None:
    """Runs stage one on the pairs and writes a cache into the folder."""
    rows = measure_pairs(model, pairs, [sae], setting.recipe, token_budget=setting.token_budget, keep_features=KEPT)
    write_cache(folder / "cache", rows, [sae], setting, model)


def make_trainer(folder: Path, setting: Setting, method: str, sae: SiteSAE, **settings: Any) -> FPOTrainer:
    """`FPOTrainer`, as `fpo align` makes it, with the same random weights each time."""
    divergence = METHODS[method].divergence
    saes = [sae] if divergence == "features" else []
    chosen = common(setting, folder) | {"output_dir": str(folder / f"run-{method}"), "method": method}
    chosen |= {"token_budget": setting.token_budget}
    return FPOTrainer(
        load(setting, folder, FLEX),
        FPOConfig(**(chosen | settings)),
        open_cache(folder / "cache", sites=[sae.site.name for sae in saes]),
        saes=saes,
        reference=load(setting, folder, FLEX) if divergence == "kl" else None,
    )
