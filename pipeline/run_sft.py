"""`fpo sft`: supervised fine-tuning on chat data, from a configuration to the model that both stages start from.

In: a `RunConfig`, and which options were given on the command line. Out: a model with its tokenizer and the chat
template that it was tuned in, in `--out`, with `run.yaml` and `metrics.jsonl`. What can be refused is refused before
anything is written.
"""

from functools import partial
from typing import Any

from ..stages.chat import ChatFormat, load_template
from ..stages.conversations import load_conversations
from ..stages.models import attentions_to_try, check_vocabulary, find_model, load_model, load_tokenizer
from ..stages.row_config import RowConfig
from ..stages.sft import SFTTrainer
from ..stages.supported import load_supported
from .config import RunConfig
from .inputs import device_of, required
from .progress import console
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
    check_resume(config, out, {})  # once more below: tokenising takes its time
    template = load_template(config.chat_template)
    source = find_model(name)
    tokenizer = load_tokenizer(source)
    chat = ChatFormat(tokenizer, template)
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
        console.print(f"{out}: the model, run.yaml, metrics.jsonl")


def _stop_at(model: Any, end_id: int) -> None:
    """Makes `generate` stop at the token that closes an answer; a base model's own settings know EOS alone."""
    known = model.generation_config.eos_token_id
    ends = [] if known is None else [known] if isinstance(known, int) else list(known)
    if end_id not in ends:
        model.generation_config.eos_token_id = [*ends, end_id]
