"""`fpo sft`: supervised fine-tuning on chat data, from a configuration to the model that both stages start from.

In: a `RunConfig`, and which options were given on the command line. Out: a model with its tokenizer and the chat
template that it was tuned in, in `--out`, with `run.yaml` and `metrics.jsonl`. What can be refused is refused before
anything is written.
"""

import datetime
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list

from ...stages.data.chat import load_template
from ...stages.data.conversations import load_conversations
from ...stages.model.models import attentions_to_try, find_model, load_model
from ...stages.model.tokenizer import check_vocabulary, load_tokenizer
from ...stages.scoring.supported import check_length, load_supported
from ...stages.train.callbacks import summary
from ...stages.train.config import RowConfig
from ...stages.train.sft import SFTTrainer
from ..config import RunConfig
from ..plain_yaml import read_yaml
from ..progress import console
from .inputs import chat_of, device_of, required
from .training import (
    check_resume,
    finish,
    is_finished,
    last_checkpoint,
    missing_trackers,
    run_callbacks,
    sole_run,
    trainer_settings,
)


def run_sft(config: RunConfig, given: frozenset[str]) -> None:
    """`fpo sft`."""
    name, dataset, out = required(config, "model", "dataset", "out")
    args = RowConfig(**trainer_settings(config, given))
    config = _on_recorded_day(config, out)
    check_resume(config, out, {})  # once more below: tokenising takes its time
    template = load_template(config.chat_template)
    source = find_model(name)
    tokenizer = load_tokenizer(source)
    chat = chat_of(config, tokenizer, template)
    if chat.date is not None:
        (day,) = broadcast_object_list([chat.date.isoformat()])  # it may be midnight between two ranks
        config, chat = config.model_copy(update={"date": day}), chat.on(datetime.date.fromisoformat(day))
    device = device_of(config)
    attentions = attentions_to_try(config.attention, source, device)
    with args.main_process_first(desc="tokenising"):
        conversations = load_conversations(
            dataset,
            split=config.split,
            chat=chat,
            max_length=config.max_length,
            config=config.dataset_config,
            limit=config.limit,
            renames=config.map,
        )
    identity = {"model_sha256": source.sha256, "data_sha256": conversations.sha256}
    check_resume(config, out, identity)
    if is_finished(config, out):
        return
    skipped = [f"skipped {number}: {reason}" for reason, number in sorted(conversations.skipped.items())]
    if not len(conversations):
        raise ValueError(
            f"--dataset: expected conversations to learn from, found none in {dataset}; {'; '.join(skipped)}"
        )
    if args.process_index == 0:
        console.print(
            f"{len(conversations)} conversations, {conversations.tokens} tokens, {conversations.learnt_tokens} of them "
            f"learnt; truncated conversations {conversations.truncated}"
        )
        for line in skipped:
            console.print(line)
    model = load_supported(partial(load_model, source, device=device), attentions, console.print)
    model.name_or_path = source.lasting_name
    check_vocabulary(model, tokenizer, chat.probe_ids)
    check_length(model, config.max_length)
    _stop_at(model, chat.end_id)
    tokenizer.chat_template = chat.template
    with missing_trackers():
        trainer = SFTTrainer(
            model,
            args,
            conversations,
            processing_class=tokenizer,
            callbacks=run_callbacks(config, {**identity, "training_device": str(args.device)}),
        )
    with sole_run(config, out, identity):
        trainer.train(resume_from_checkpoint=last_checkpoint(config))
        finish(trainer, out)
    if args.process_index == 0:
        console.print("\n".join(summary(trainer.state.log_history)))
        console.print(f"{out}: the model, run.yaml, metrics.jsonl")
        console.print(f"next: fpo precompute --model {out} --dataset PAIRS --sae SAE --out CACHE")


def _on_recorded_day(config: RunConfig, out: Path) -> RunConfig:
    """The configuration with the day on which the run that is resumed was begun, unless it names one."""
    record = out / "run.yaml"
    if not config.resume or config.date is not None or not record.exists():
        return config
    try:
        before = read_yaml(record.read_bytes())
    except ValueError:  # `check_resume` says what is wrong
        return config
    return config.model_copy(update={"date": before.get("date") if isinstance(before, dict) else None})


def _stop_at(model: Any, end_id: int) -> None:
    """Makes `generate` stop at the token that closes an answer; a base model's own settings know EOS alone."""
    known = model.generation_config.eos_token_id
    ends = [] if known is None else [known] if isinstance(known, int) else list(known)
    if end_id not in ends:
        model.generation_config.eos_token_id = [*ends, end_id]
