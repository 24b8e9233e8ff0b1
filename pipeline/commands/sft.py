"""`fpo sft`: supervised fine-tuning on chat data, from a configuration to the model that both stages start from.

In: an `SFTConfig`. Out: a model with its tokenizer and the chat
template that it was tuned in, in `--out`, with `run.yaml` and `metrics.jsonl`. What can be refused is refused before
anything is written.
"""

import datetime
from typing import Any

import typer
from accelerate.utils import broadcast_object_list

from ...cache.errors import UserError
from ...stages.data.chat import load_template
from ...stages.data.conversations import load_conversations
from ...stages.model.models import find_model
from ...stages.model.tokenizer import check_vocabulary, load_tokenizer
from ...stages.scoring.supported import check_length
from ...stages.train.callbacks import summary
from ...stages.train.config import RowConfig
from ...stages.train.sft import SFTTrainer
from ..config import SFTConfig
from .inputs import RECORD, chat_format, load_causal_lm, read_record
from .training import (
    check_resume,
    finish,
    is_finished,
    last_checkpoint,
    run_callbacks,
    sole_run,
    tracked,
    trainer_settings,
)


def run_sft(config: SFTConfig) -> None:
    """`fpo sft`."""
    args = RowConfig(**trainer_settings(config))
    config = _on_recorded_day(config)
    check_resume(config, {})  # checked again below: tokenising takes a while
    template = load_template(config.chat_template)
    source = find_model(config.model)
    tokenizer = load_tokenizer(source)
    chat = chat_format(tokenizer, template, config.date)
    if chat.date is not None:
        (day,) = broadcast_object_list([chat.date.isoformat()])  # two ranks may start on either side of midnight
        config, chat = config.model_copy(update={"date": day}), chat.on(datetime.date.fromisoformat(day))
    with args.main_process_first(desc="tokenising"):
        conversations = load_conversations(
            config.dataset,
            split=config.split,
            chat=chat,
            max_length=config.max_length,
            config=config.dataset_config,
            limit=config.limit,
            renames=config.map,
        )
    identity = {"model_sha256": source.sha256, "data_sha256": conversations.sha256}
    check_resume(config, identity)
    if is_finished(config):
        return
    skipped = [f"skipped {number}: {reason}" for reason, number in sorted(conversations.skipped.items())]
    if not len(conversations):
        raise UserError(
            f"--dataset: expected conversations to learn from, found none in {config.dataset}; {'; '.join(skipped)}"
        )
    if args.process_index == 0:
        typer.echo(
            f"{len(conversations)} conversations, {conversations.tokens} tokens, {conversations.learnt_tokens} of them "
            f"learnt; truncated conversations {conversations.truncated}"
        )
        for line in skipped:
            typer.echo(line)
    model = load_causal_lm(config, source)
    model.name_or_path = source.lasting_name
    check_vocabulary(model, tokenizer, chat.probe_ids)
    check_length(model, config.max_length)
    _stop_at(model, chat.end_id)
    tokenizer.chat_template = chat.template
    with tracked(config.report_to):
        trainer = SFTTrainer(
            model,
            args,
            conversations,
            processing_class=tokenizer,
            callbacks=run_callbacks(config, {**identity, "training_device": str(args.device)}),
        )
    with sole_run(config, identity):
        trainer.train(resume_from_checkpoint=last_checkpoint(config))
        finish(trainer, config.out)
    if args.process_index == 0:
        typer.echo("\n".join(summary(trainer.state.log_history)))
        typer.echo(f"{config.out}: the model, run.yaml, metrics.jsonl")
        typer.echo(f"next: fpo precompute --model {config.out} --dataset PAIRS --sae SAE --out CACHE")


def _on_recorded_day(config: SFTConfig) -> SFTConfig:
    """The configuration with the day on which the run that is resumed was begun, unless it names one."""
    if not config.resume or config.date is not None or not (config.out / RECORD).exists():
        return config
    return config.model_copy(update={"date": read_record(config.out, "--resume").get("date")})


def _stop_at(model: Any, end_id: int) -> None:
    """Makes `generate` stop at the token that closes an answer; a base model's own settings know EOS alone."""
    known = model.generation_config.eos_token_id
    ends = [] if known is None else [known] if isinstance(known, int) else list(known)
    if end_id not in ends:
        model.generation_config.eos_token_id = [*ends, end_id]
