"""`fpo merge`: an adapter added into its model's weights, as `fpo align --merge` would have saved it.

In: a run's folder or a hub id that holds a LoRA adapter, and perhaps its base model. Out: a model's folder with
tokenizer, chat template and model card.
"""

from pathlib import Path

import typer

from ...cache.errors import UserError
from ...stages.model.adapters import AdapterSource, load_adapter
from ...stages.model.tokenizer import load_tokenizer
from ...stages.train.checkpoints import copy_processor, move_model, saving
from ...stages.train.model_card import card_of_merged
from .inputs import check_new, policy_of, sole_writer


def run_merge(run: str, out: Path, base: str | None) -> None:
    """`fpo merge`."""
    check_new(out)
    source = policy_of(run, base)
    if not isinstance(source, AdapterSource):
        raise UserError(f"expected an adapter to merge in {source.folder}, found a model; it can be used as it is")
    tokenizer = load_tokenizer(source.tokenizer)
    model = load_adapter(source, attention="eager", device="cpu").merge_and_unload()
    with sole_writer(out):
        check_new(out)
        new = out / ".new"
        with saving(out):
            model.save_pretrained(new)
            tokenizer.save_pretrained(new)
            copy_processor(tokenizer, new)
            (new / "README.md").write_text(card_of_merged(source))
            move_model(new, out)
    typer.echo(f"{out}: the model, merged from {run}")
