"""Two processes over gloo on this machine, as a launcher would start them, and what they run.

(A spawned process finds what it runs by the name of its module, which pytest does not give to test files.)
"""

import datetime
import os
import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from fpo.stages.data import rendering
from fpo.stages.model import flex
from fpo.stages.train.align import FPOTrainer
from fpo.stages.train.callbacks import Snapshots
from fpo.stages.train.config import FPOConfig
from pairs import calm_gemma2, calm_llama
from tiny_world import World, fpo, ran
from torch import Tensor
from torch._dynamo.utils import counters
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

# What `accelerate launch` sets for a configuration with FSDP2, as `pipeline/launch/` has it.
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}


def on_ranks(function: Callable[..., Any], folder: Path, *arguments: Any, fsdp: bool = False, ranks: int = 2) -> Any:
    """Runs `function(*arguments)` in every rank; returns what it returned in each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launched = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"}
    with mock.patch.dict(os.environ, launched | (FSDP if fsdp else {})):
        torch.multiprocessing.spawn(_rank, (folder, function, arguments, fsdp), nprocs=ranks)
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in range(ranks)]


def _rank(rank: int, folder: Path, function: Callable[..., Any], arguments: tuple[Any, ...], fsdp: bool) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    flex.BACKEND = "aot_eager"  # of layers that are compiled
    if fsdp:
        _shard_on_cpu()
    torch.save(function(*arguments), folder / f"rank-{rank}.pt")
    torch.distributed.destroy_process_group()


def _shard_on_cpu() -> None:
    """Has accelerate shard weights on a CPU, where it would run DDP instead without saying so."""
    from accelerate.state import AcceleratorState, DistributedType, PartialState
    from accelerate.utils import FullyShardedDataParallelPlugin
    from transformers import Trainer

    make = Trainer.create_accelerator_and_postprocess

    def make_sharding(self: Trainer) -> None:
        make(self)
        for state in (AcceleratorState, PartialState):
            state._shared_state["distributed_type"] = DistributedType.FSDP
        self.accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
        self.is_fsdp_enabled = True

    Trainer.create_accelerator_and_postprocess = make_sharding


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that may be sharded, whole, on every rank."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


# One step of training.

PAIRS = 7  # of the held-out cache: two ranks never have as many
ONE_BATCH = {"per_device_train_batch_size": PAIRS, "token_budget": 10_000}
# Per rank: 4 and 3 pairs in rows of their own; 2 and 2, then 2 and 1; 3 and 3, then 1 and none.
SETTINGS: dict[str, dict[str, Any]] = {
    "one batch": {"per_device_train_batch_size": 4, "token_budget": 1},
    "checkpointing": {"per_device_train_batch_size": 4, "token_budget": 1, "activation_checkpointing": True},
    "compiled layers": {"per_device_train_batch_size": 4, "token_budget": 120, "compile_layers": True},
    "accumulation": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "token_budget": 120},
    "a rank without pairs": {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "token_budget": 120},
}
SETTINGS["a rank without pairs"]["activation_checkpointing"] = True
MODELS = {"tied": calm_gemma2, "untied": calm_llama}


class Watch(TrainerCallback):
    """Keeps the gradients of a step before clipping."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.gradients = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def policy_of(world: World, heads: str) -> Any:
    vocabulary = world.policy().config.vocab_size
    return MODELS[heads](seed=5, vocab_size=vocabulary, tie_word_embeddings=heads == "tied")


def make_trainer(world: World, out: Path, heads: str, kind: type[FPOTrainer] = FPOTrainer, **settings: Any) -> Any:
    """A trainer on the held-out pairs that steps by SGD at learning rate 1, from a model that is not the cache's."""
    defaults = {"use_cpu": True, "report_to": "none", "save_strategy": "no", "bf16": False, "disable_tqdm": True}
    defaults |= {"optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant", "warmup_steps": 0}
    defaults |= {"max_steps": 1, "allow_different_start": True, "max_grad_norm": 0.0, "weight_decay": 0.0}
    callbacks = settings.pop("callbacks", None)
    pairs = world.open((0,), "eval_cache")
    args = FPOConfig(output_dir=str(out), **(defaults | settings))
    return kind(policy_of(world, heads), args, pairs, pairs, saes=[world.load_sae()], callbacks=callbacks)


def step(world: World, out: Path, heads: str, scale: float = 1.0, **settings: Any) -> tuple[dict[str, Tensor], ...]:
    """Gradients before clipping and weights after one step."""

    class Scaled(FPOTrainer):
        def row_loss(self, *args: Any) -> Tensor:
            return scale * super().row_loss(*args)

    watch = Watch()
    trainer = make_trainer(world, out, heads, Scaled, callbacks=[watch], **settings)
    trainer.train()
    assert counters["stats"]["unique_graphs"] or not settings.get("compile_layers"), "no layer was compiled"
    assert isinstance(trainer.model, FSDPModule) == ("ACCELERATE_USE_FSDP" in os.environ)
    return watch.gradients, {name: whole(weight) for name, weight in trainer.model.named_parameters()}


def steps(world: Path, out: Path) -> dict[tuple[str, str], tuple[dict[str, Tensor], ...]]:
    """A step of both models under all settings; `world` is the folder of a `World`."""
    return {(heads, name): step(World(world), out, heads, **SETTINGS[name]) for heads in MODELS for name in SETTINGS}


# A run that is evaluated, saved, stopped and resumed.

RUN: dict[str, Any] = {"per_device_train_batch_size": 3, "max_steps": 4, "optim": "adamw_torch", "learning_rate": 1e-3}
RUN |= {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "logging_steps": 1}
RUN |= {"per_device_eval_batch_size": 3}  # six pairs, then one: a rank has none


def whole_run(world: Path, out: Path, **settings: Any) -> list[dict[str, float]]:
    """Four steps in one go, and again from the checkpoint in the middle; the log of the first."""
    settings = RUN | settings
    trainer = make_trainer(World(world), out / "run", "tied", callbacks=[Snapshots(3)], **settings)
    trainer.train()
    trainer.save_model()
    again = make_trainer(World(world), out / "again", "tied", **settings)
    again.train(resume_from_checkpoint=str(out / "run" / "checkpoint-2"))
    again.save_model()
    return trainer.state.log_history


def fine_tune_about_midnight(arguments: list[str]) -> str:
    """Fine-tunes on ranks of which one lives on the next day; returns the day that its conversations show."""
    from fpo.pipeline.commands import sft as run_sft

    day = datetime.date(2026, 11, 23 + int(os.environ["RANK"]))
    date = type("Date", (datetime.date,), {"today": classmethod(lambda cls: day)})
    days, load = [], run_sft.load_conversations

    def noting(*args: Any, chat: Any, **options: Any) -> Any:
        days.append(chat.date.isoformat())
        return load(*args, chat=chat, **options)

    clock = mock.patch.object(rendering, "datetime", SimpleNamespace(date=date))
    with clock, mock.patch.object(run_sft, "load_conversations", noting):
        ran(fpo(*arguments))
    return str(days[0])
