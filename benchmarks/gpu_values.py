"""The sections of `gpu_check` that verify what a GPU computes.

In: a `Bench`. Out: figures in its report.
"""

import dataclasses
import importlib.metadata
import math
import statistics
from typing import Any

import torch
from fpo.stages.model.flex import FLEX
from fpo.stages.scoring.forward import row_layout, score_row
from fpo.stages.scoring.packing import pack
from torch import Tensor

from .gpu_bench import TINY, Bench, make_cache, make_sae, make_trainer, tiny_config
from .pairs import random_pairs
from .reporting import PACKAGES, hardware
from .setting import Setting, load

# In bf16 the head size of Gemma-2-2B, so that later sections reuse the compiled kernels; in fp32 less shared memory is
# left.
HEAD_DIM = {"bf16": 256, "fp32": 64}
TINY_HEAD_DIM = 32
METHODS = ("fpo", "dpo", "simpo", "tdpo2")
STEPS, EVERY, SAVED = 12, 5, 6


def card(bench: Bench) -> None:
    """Reports versions, and the device's rates of matrix products and of copies."""
    versions = {name: _version(name) for name in PACKAGES}
    bench.report.add("card", **hardware(), versions=versions)
    size, cuda = (8192, True) if bench.device == "cuda" else (256, False)
    left, right = (torch.randn(size, size, dtype=torch.bfloat16, device=bench.device) for _ in range(2))
    source = torch.randn(size, size, 4, device=bench.device)
    target = torch.empty_like(source)
    seconds = _median_seconds(bench, lambda: left @ right)
    bench.rate = 2 * size**3 / seconds
    copied = 2 * source.nbytes / _median_seconds(bench, lambda: target.copy_(source))
    tf32 = 0.0
    if cuda:
        single_left, single_right = left.float(), right.float()
        torch.backends.cuda.matmul.allow_tf32 = True
        tf32 = 2 * size**3 / _median_seconds(bench, lambda: single_left @ single_right) / 1e12
        torch.backends.cuda.matmul.allow_tf32 = False
    bench.report.add("card", bf16_tflops=bench.rate / 1e12, tf32_tflops=tf32, copy_tb_a_second=copied / 1e12)


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _median_seconds(bench: Bench, work: Any, repeats: int = 10) -> float:
    found = []
    for number in range(repeats + 3):
        start = bench.now()
        work()
        if number >= 3:
            found.append(bench.now() - start)
        else:
            bench.now()
    return statistics.median(found)


def values(bench: Bench) -> None:
    """Compares compiled with eager attention, in the same recipe and in fp32."""
    for recipe in ("bf16", "fp32"):
        for kind in ("gemma2", "gemma3_text", "llama"):
            start, before = bench.now(), bench.compilations()
            head_dim = TINY_HEAD_DIM if bench.tiny else HEAD_DIM[recipe]
            found = {
                name: _scored(kind, attention, head_dim, chosen, bench)
                for name, attention, chosen in (
                    ("exact", "eager", "fp32"),
                    ("eager", "eager", recipe),
                    ("ours", FLEX, recipe),
                )
            }
            bench.report.add(
                "values",
                kind=kind,
                recipe=recipe,
                finite=bool(torch.stack([tensor.isfinite().all() for tensor in found["ours"]]).all()),
                **{
                    f"{what}_{first}_{second}": _apart(found[first][number], found[second][number])
                    for number, what in enumerate(("logps", "gradient"))
                    for first, second in (("ours", "eager"), ("ours", "exact"), ("eager", "exact"))
                },
                compilations=bench.compilations() - before,
                took=round(bench.now() - start, 1),
            )


def _apart(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def _scored(kind: str, attention: str, head_dim: int, recipe: Any, bench: Bench) -> tuple[Tensor, Tensor]:
    """Log-probs of the tokens of a row, float32 [T], and the flat gradient of a weighted sum of them."""
    from transformers import AutoModelForCausalLM

    config = tiny_config(kind, head_dim)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention)
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if weight.ndim == 2:  # large enough that attention matters
            factor = 2 if "q_proj" in name or "k_proj" in name else 1
            weight.data = factor * torch.randn(weight.shape, generator=generator) / math.sqrt(weight.shape[1])
    model, device = model.to(bench.device).train(), bench.device
    lengths = dataclasses.replace(TINY, max_length=400, prompt=120, response=150)
    pairs = random_pairs(lengths, config.vocab_size, 2 if bench.tiny else 6)
    (row,) = pack(pairs, 2**62, row_layout(model))
    scores = score_row(model, row.to(device), [], recipe)
    weights = torch.linspace(-1, 1, len(scores.token_logps_T), device=device)
    (scores.token_logps_T * weights).sum().backward()
    gradient = torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None])
    return scores.token_logps_T.detach(), gradient


def runs(bench: Bench) -> None:
    """Trains 12 steps of each method, resumes from a checkpoint, and compares the two ends."""
    folder = bench.folder / "tiny"
    setting = dataclasses.replace(TINY, device=bench.device, recipe=bench.large.recipe)
    config = tiny_config("gemma2", TINY_HEAD_DIM if bench.tiny else HEAD_DIM["bf16"])
    config.save_pretrained(folder / "model")
    sae = make_sae(folder, config, setting)
    pairs = random_pairs(setting, config.vocab_size, STEPS * setting.batch)
    make_cache(folder, load(setting, folder, FLEX), pairs, sae, setting)
    for method in METHODS:
        start, before = bench.now(), bench.compilations()
        _run(bench, folder, setting, method, sae)
        bench.report.add(
            "runs",
            method=method,
            compilations=bench.compilations() - before,
            took=round(bench.now() - start, 1),
        )


def _run(bench: Bench, folder: Any, setting: Setting, method: str, sae: Any) -> None:
    steps = {"max_steps": STEPS, "logging_steps": EVERY, "save_strategy": "steps", "save_steps": SAVED}
    steps |= {"learning_rate": 1e-4, "compile_layers": bench.compiled}
    trainer = make_trainer(folder, setting, method, sae, **steps)
    trainer.train()
    logged = [line for line in trainer.state.log_history if "loss" in line]
    again = make_trainer(folder, setting, method, sae, **steps)
    again.train(resume_from_checkpoint=f"{trainer.args.output_dir}/checkpoint-{SAVED}")
    ends = [next(line for line in reversed(run.state.log_history) if "loss" in line) for run in (trainer, again)]
    bench.report.add(
        "runs",
        method=method,
        logged={line["step"]: round(line["loss"], 4) for line in logged},
        grad_ratio=[line.get("constraint/grad_ratio") for line in logged],
        parity=trainer.parity,
        last_loss=[end["loss"] for end in ends],
        resumed_is_close=bool(abs(ends[0]["loss"] - ends[1]["loss"]) < 0.02),
    )
