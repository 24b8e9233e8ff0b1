"""What the end of a run needs, tried before its first step.

In: a Trainer that is about to train. Out: nothing, or one line that says what could not be done. A model whose settings
cannot be saved, a tokenizer that cannot be read back, a tracker that does not start or a disk too small would lose all
steps; what can be put right here is, with a note.
"""

import errno
import inspect
import logging
import math
import os
import shutil
from pathlib import Path
from typing import Any

from torch import nn

from ...cache.errors import reading
from ...cache.files import temporary_folder
from ..model.anatomy import causal_lm
from .checkpoints import copy_processor, saving

NOTES = logging.getLogger("fpo")
# Settings of `generate` that mean nothing without beams.
BEAMS = ("early_stopping", "length_penalty")
# And those that mean nothing without sampling, with the values that say nothing.
SAMPLING: dict[str, Any] = {
    **{"temperature": 1.0, "top_p": 1.0, "top_k": 50, "typical_p": 1.0},
    **{"epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "min_p": None, "top_h": None},
}
# Bytes of the optimiser's state for a weight that is trained; of others too little is assumed, never too much.
STATE_BYTES = {"adamw_torch_fused": 8, "adamw_torch": 8, "rmsprop": 4}


def rehearse(trainer: Any, *, resumed: bool) -> None:
    """Does on rank 0, without the weights, what the end of a run does.

    Args:
        trainer: a `RowTrainer`.
        resumed: whether it goes on from a checkpoint, whose model and tokenizer were saved as the last ones will be:
            then nothing is written.

    Raises:
        UserError: something could not be saved or read back, or a tracker could not be started.
        OSError: the output folder cannot be written, or has too little space.
    """
    from transformers.trainer_utils import align_special_tokens

    if not trainer.args.should_save:
        return
    out, model, tokenizer = Path(trainer.args.output_dir), trainer.model, trainer.processing_class
    if tokenizer is not None:
        align_special_tokens(model, tokenizer)  # as the Trainer does first, so that it is tried as it will be
    for note in settle_generation(causal_lm(model)):
        NOTES.warning("%s", note)
    with saving(out):
        out.mkdir(parents=True, exist_ok=True)
        check_space(trainer, out)
        if not resumed:
            with temporary_folder(out) as folder, reading("model: transformers cannot save it and read it back"):
                _save(trainer, folder)
                _read_back(folder, tokenizer)
    _start_trackers(trainer)


def settle_generation(model: Any) -> list[str]:
    """Puts right the settings of `generate` that transformers would refuse to save.

    Args:
        model: a causal LM.

    Returns:
        What was changed, a line each.

    Raises:
        UserError: some are wrong in another way.
    """
    config = getattr(model, "generation_config", None)
    if config is None:
        return []
    notes = []
    of_sampling = [name for name, silent in SAMPLING.items() if getattr(config, name, None) not in (None, silent)]
    if of_sampling and config.do_sample is None:
        config.do_sample = True
        notes.append(f"do_sample is set to true, which {', '.join(of_sampling)} of the model's settings mean")
    elif of_sampling and not config.do_sample:
        for name in of_sampling:
            setattr(config, name, None)
        notes.append(f"{', '.join(of_sampling)} are left out, which mean nothing with the model's do_sample false")
    of_beams = [name for name in BEAMS if getattr(config, name, None) not in (None, False, 1.0)]
    if of_beams and config.num_beams in (None, 1):
        for name in of_beams:
            setattr(config, name, None)
        notes.append(f"{', '.join(of_beams)} are left out, which mean nothing without the model's num_beams")
    if config.pad_token_id is not None and config.pad_token_id < 0:
        config.pad_token_id = None
        notes.append("pad_token_id is left out, which was below 0")
    with reading("model: expected a generation_config.json that transformers saves; correct it"):
        config.validate(strict=True)
    return [f"generation_config.json: {note}" for note in notes]


def check_space(trainer: Any, out: Path) -> None:
    """Checks that what a run will leave in its folder fits the disk.

    Raises:
        OSError: it does not.
    """
    needed = _bytes_to_come(trainer) - sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    free = shutil.disk_usage(out).free
    if needed > free:
        what = f"{out} (about {needed / 1e9:.2g} GB will be written, {free / 1e9:.2g} GB are free)"
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), what)


def _bytes_to_come(trainer: Any) -> int:
    """The most that a run's folder will hold: checkpoints, one of them while it replaces another, and the model."""
    args = trainer.args
    trained = [weight for weight in trainer.model.parameters() if weight.requires_grad]
    saved = trained if hasattr(trainer.model, "peft_config") else list(trainer.model.parameters())
    weights: int = sum(weight.numel() * weight.element_size() for weight in saved)
    state: int = sum(weight.numel() for weight in trained) * STATE_BYTES.get(
        str(getattr(args.optim, "value", args.optim)), 0
    )
    if str(getattr(args.save_strategy, "value", args.save_strategy)) != "steps":
        return weights
    batch = args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps
    steps = (
        args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * len(trainer.train_dataset) / batch)
    )
    every = args.save_steps if args.save_steps >= 1 else max(1, math.ceil(args.save_steps * steps))
    made: int = math.ceil(steps / every)
    kept: int = min(made, args.save_total_limit or made)
    checkpoint = weights + state
    return int(max(min(made, kept + 1) * checkpoint, kept * checkpoint + weights))


def _save(trainer: Any, folder: Path) -> None:
    """Settings, tokenizer and template as `Trainer.save_model` writes them; of an adapter's model its own as well."""
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    inner = causal_lm(trainer.model)
    inner.save_pretrained(folder, state_dict={})
    remove_tied_weights_from_state_dict(dict(inner.state_dict()), inner)  # refuses weights that share memory untold
    if inner is not trainer.model:
        trainer.model.save_pretrained(folder / "adapter")
    if trainer.processing_class is not None:
        trainer.processing_class.save_pretrained(folder)
        copy_processor(trainer.processing_class, folder)


def _read_back(folder: Path, tokenizer: Any) -> None:
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if (folder / "generation_config.json").exists():
        GenerationConfig.from_pretrained(folder, local_files_only=True)
    if tokenizer is None:
        return
    again = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if again.get_vocab() != tokenizer.get_vocab() or again.chat_template != tokenizer.chat_template:
        raise ValueError("expected the tokenizer that was saved, found another vocabulary or chat template")


def _start_trackers(trainer: Any) -> None:
    """Starts what `--report-to` names, which otherwise starts when training does; it starts but once."""
    for callback in trainer.callback_handler.callbacks:
        if getattr(callback, "_initialized", True) or not hasattr(callback, "setup"):
            continue
        takes = inspect.signature(callback.setup).parameters
        more = {"processing_class": trainer.processing_class} if "processing_class" in takes else {}
        with reading(f"--report-to: {type(callback).__name__.removesuffix('Callback')} does not start"):
            callback.setup(trainer.args, trainer.state, trainer.model, **more)


def outside_decoder(model: nn.Module) -> str | None:
    """A pattern of the names of modules that training on text does not run, for PEFT; None if all are run.

    Args:
        model: a causal LM, perhaps one that sees as well (Gemma-3).
    """
    decoder, head = model.get_decoder(), model.get_output_embeddings()  # type: ignore[operator]
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    inside = {id(module) for module in [*decoder.modules(), head]}
    if all(id(module) in inside for module in model.modules() if isinstance(module, nn.Linear)):
        return None
    return rf"(?!{prefix.replace('.', chr(92) + '.')}\.).*"
