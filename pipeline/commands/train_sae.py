"""`fpo train-sae`: from a configuration to an SAE for a model that has none.

In: a `TrainSAEConfig`. Out: an SAE in SAELens' format in `--out`, its quality on the terminal and in `quality.json`.
"""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import typer

from ...cache.errors import UserError
from ...cache.files import write_atomically
from ...stages.data.tokenize import tokenize_pair
from ...stages.model.sae import parse_site
from ...stages.model.tokenizer import check_tokens, check_vocabulary
from ...stages.scoring.supported import check_length
from ...stages.train.checkpoints import move_model
from ...stages.train.train_sae import train_sae
from ..config import TrainSAEConfig
from .inputs import RECORD, check_folder, load_causal_lm, load_data, record_of, sole_writer


def run_train_sae(config: TrainSAEConfig) -> None:
    """`fpo train-sae`."""
    out = config.out
    _check_out(out)  # checked again below: another run may have started meanwhile
    site = parse_site(config.site[0])
    source, preferences, chat, limits = load_data(config)
    model = load_causal_lm(config, source)
    check_vocabulary(model, chat.tokenizer, chat.probe_ids)
    check_length(model, limits.max_length)
    sequences, seen = [], set()
    for row in range(len(preferences)):
        pair = tokenize_pair(preferences.example(row), row, chat, limits).pair
        if pair is None:
            continue
        for ids in (pair.chosen_ids, pair.rejected_ids):
            conversation = np.concatenate([pair.prompt_ids, ids])
            check_tokens(model, [(f"row {row}", conversation)], chat.tokenizer)
            if conversation.tobytes() not in seen:  # prompts and answers repeat across pairs
                seen.add(conversation.tobytes())
                sequences.append(conversation)
    typer.echo(f"{len(sequences)} conversations, {sum(map(len, sequences))} tokens, site {site.name}")
    with sole_writer(out):
        _check_out(out)
        new = out / ".new"
        shutil.rmtree(new, ignore_errors=True)  # left by a run that was stopped while it saved
        quality = train_sae(
            model,
            sequences,
            site=site,
            width=config.width,
            tokens=config.tokens,
            out=new,
            model_name=source.name,
            target_l0=config.target_l0,
            seed=config.seed,
        )
        write_atomically(new / "quality.json", json.dumps(asdict(quality), indent=1).encode())
        write_atomically(new / RECORD, record_of(config, {}).encode())
        move_model(new, out)
    typer.echo(
        f"{out}: L0 {quality.l0:.1f}, explained variance {quality.explained_variance:.3f}, "
        f"dead features {quality.dead:.1%}, on {quality.tokens} held-out tokens after {quality.passes:.1f} passes"
    )


def _check_out(out: Path) -> None:
    """Refuses a folder that holds an SAE; what a stopped run left of one is replaced."""
    check_folder(out)
    if (out / "cfg.json").exists():
        raise UserError(f"{out} already holds an SAE: choose another folder or remove it")
