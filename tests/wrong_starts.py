"""Runs that would start against another model than their cache's, and the table of what each differs by.

In: the tiny world. Out: options for `fpo align`, by what is wrong. Run as a script it writes
`results/reliability/wrong_starts.md`.
"""

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cache_rows import forge
from fpo.cache.manifest import Manifest
from fpo.cache.schema import CachedPair, pair_id
from fpo.stages.data.chat import GEMMA_TURNS
from fpo.stages.model.models import find_model
from fpo.stages.model.sae import load_sae
from pairs import calm_gemma2
from pairs import swapped as with_sides_swapped
from tiny import save_tiny_sae
from tiny_tokenizers import gemma
from tiny_world import SITES, World, make_world, metrics, ran, save_model

TABLE = Path(__file__).parents[1] / "results" / "reliability" / "wrong_starts.md"
HEAD = """\
# What a wrong start differs by, before the first step

Of the model of four layers and the 12 pairs that the tests stand on, responses of 19 tokens on average: the largest
difference between policy and cache, and what is allowed for that response; **bold** is beyond it and stops the run.
Where model or SAE are others, the cache's hashes were made to agree with theirs: it is by its hash that such a start is
refused otherwise, and that another chat template always is. Written by `python tests/wrong_starts.py`.
"""

Case = Callable[[World, Path], dict[str, Any]]


def another_model(world: World, folder: Path) -> Path:
    return save_model(folder / "model", lambda **sizes: calm_gemma2(1, **sizes), gemma())


def fine_tuned(world: World, folder: Path, lr: float = 5e-7) -> Path:
    """One step of DPO, by default at the paper's learning rate."""
    ran(world.align(folder / "model", method="dpo", max_steps=1, lr=lr))
    (folder / "model" / "run.yaml").unlink()
    return folder / "model"


def with_hash(world: World, folder: Path, model: Path) -> dict[str, Any]:
    """Options to train a model on a cache that says it was made with it."""
    return {"model": model, "cache": forge(world.cache, folder / "cache", model=find_model(str(model)).sha256)}


def with_template(world: World, folder: Path) -> Path:
    model = shutil.copytree(world.gemma, folder / "model")
    (model / "chat_template.jinja").write_text(GEMMA_TURNS.replace("<end_of_turn>", "<end_of_turn><eos>"))
    return model


def with_tokenizer(world: World, folder: Path) -> Path:
    """The tokenizer with two of its tokens exchanged: as many tokens, and nearly the same text to them."""
    model = shutil.copytree(world.gemma, folder / "model")
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    return model


def another_sae(folder: Path) -> Path:
    save_tiny_sae(folder / "sae", 32, 64, 9, "jumprelu", SITES[0])
    return folder / "sae"


def says_another_sae(world: World, folder: Path) -> dict[str, Any]:
    sae, sites = another_sae(folder), Manifest.load(world.cache).meaning.sites
    sites = (dataclasses.replace(sites[0], sae=load_sae(str(sae)).sha256), *sites[1:])
    return {"sae": sae, "cache": forge(world.cache, folder / "cache", sites=sites)}


def says_another_site(world: World, folder: Path) -> dict[str, Any]:
    """The cache's SAE, which cache and SAE say to be of another layer."""
    name, sites = "blocks.0.hook_resid_post", Manifest.load(world.cache).meaning.sites
    sae = shutil.copytree(world.saes[0], folder / "sae")
    config = json.loads((sae / "cfg.json").read_text())
    config["metadata"]["hook_name"] = name
    (sae / "cfg.json").write_text(json.dumps(config))
    cache = forge(world.cache, folder / "cache", sites=(dataclasses.replace(sites[0], site=name), *sites[1:]))
    return {"sae": sae, "site": name, "cache": cache}


def without_bos(row: CachedPair) -> CachedPair:
    return named(row, prompt_ids=row.pair.prompt_ids[1:])


def in_other_turns(row: CachedPair) -> CachedPair:
    """The prompt as another template has it: it opens the answer with a token less."""
    return named(row, prompt_ids=row.pair.prompt_ids[:-1])


def named(row: CachedPair, **tokens: Any) -> CachedPair:
    """Other tokens, and the pair's name anew."""
    pair = dataclasses.replace(row.pair, **tokens)
    number = int(row.pair.pair_id.rpartition("-")[2])
    name = pair_id(pair.prompt_ids, pair.chosen_ids, pair.rejected_ids, number)
    return dataclasses.replace(row, pair=dataclasses.replace(pair, pair_id=name))


def swapped(row: CachedPair, *fields: str) -> CachedPair:
    """Fields of chosen and rejected exchanged; the tokens too, with the pair's name anew, if `ids` is one of them."""
    chosen, rejected = (
        dataclasses.replace(ours, **{name: getattr(theirs, name) for name in fields if name != "ids"})
        for ours, theirs in ((row.chosen, row.rejected), (row.rejected, row.chosen))
    )
    row = dataclasses.replace(row, chosen=chosen, rejected=rejected)
    return named(dataclasses.replace(row, pair=with_sides_swapped(row.pair))) if "ids" in fields else row


def flip(row: CachedPair) -> Any:
    return with_sides_swapped(row.pair)


def forged(change: Callable[[CachedPair], CachedPair]) -> Case:
    return lambda world, folder: {"cache": forge(world.cache, folder / "cache", change)}


LOGPS, FEATURES = "policy and cache differ before the first step: log-probs by", "features at blocks."
# Those for which the command tells the difference by itself, and those whose hashes were made to agree.
ALLOWED: dict[str, tuple[Case, list[str]]] = {
    "another model": (
        lambda w, f: {"model": another_model(w, f)},
        ["its reference is not", "weight hashes", "start from the model"],
    ),
    "another model of the same hash": (lambda w, f: with_hash(w, f, another_model(w, f)), [LOGPS, "expected at most"]),
    "a fine-tuned policy": (lambda w, f: {"model": fine_tuned(w, f)}, ["its reference is not", "weight hashes"]),
    "another chat template": (
        lambda w, f: {"model": with_template(w, f), "cache": with_hash(w, f, f / "model")["cache"]},
        ["its chat template is not that of", "hashes", "a format that it is not asked in"],
    ),
    "tokens of another template": (forged(in_other_turns), [LOGPS, "another model"]),
    "tokens without BOS": (forged(without_bos), [LOGPS]),
    "another SAE of the same hash": (says_another_sae, [FEATURES, "D_F", "expected at most"]),
    "another site of the same name": (says_another_site, [FEATURES, "D_F"]),
    "swapped log-probs": (forged(lambda row: swapped(row, "logp")), [LOGPS]),
    "swapped features": (forged(lambda row: swapped(row, "features")), [FEATURES]),
    "swapped tokens": (forged(lambda row: swapped(row, "ids", "num_tokens")), [LOGPS]),
}
REFUSED: dict[str, tuple[Case, list[str]]] = {
    "another SAE": (lambda w, f: {"sae": another_sae(f)}, ["--sae", "another SAE", "hashes"]),
    "another tokenizer of the same size": (lambda w, f: {"model": with_tokenizer(w, f)}, ["its tokenizer", "hashes"]),
    "another recipe": (lambda w, f: {"dtype": "bf16"}, ["--dtype", "made with fp32, found bf16", "one recipe"]),
    "another site": (lambda w, f: {"site": "blocks.0.hook_resid_post"}, ["blocks.0", "name one of these"]),
    "swapped columns": (
        forged(lambda row: dataclasses.replace(swapped(row, "logp", "features", "num_tokens", "ids"), pair=flip(row))),
        ["row 0", "pair_id: does not belong to its token ids"],
    ),
}


LRS = (5e-7, 5e-6, 5e-5, 5e-4)


class Bf16World(World):
    """A world whose cache is of the other recipe."""

    def to_align(self, out: Path, method: str = "fpo", **options: Any) -> list[str]:
        return super().to_align(out, method, **{"dtype": "bf16"} | options)


def starts() -> dict[str, Case]:
    """What the table is of: sound starts, small steps away from them, and all that is wrong but said to be right."""

    def trained(lr: float) -> Case:
        return lambda world, folder: with_hash(world, folder, fine_tuned(world, folder, lr))

    sound: dict[str, Case] = {
        "the model of the cache, packed alike": lambda world, folder: {},
        "the model of the cache, a pair a row": lambda world, folder: {"token_budget": 1},
    }
    steps = {f"one step of DPO at {lr:g}": trained(lr) for lr in LRS}
    by_hash_alone = ("another model", "a fine-tuned policy")
    return sound | steps | {name: case for name, (case, _) in ALLOWED.items() if name not in by_hash_alone}


def write_table() -> None:
    """Starts each case by request, in both recipes, and writes what its first line of metrics says."""
    text = HEAD
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["FPO_HOME"] = f"{scratch}/home"
        worlds = {"fp32": make_world(Path(scratch) / "fp32")}
        worlds["bf16"] = Bf16World(shutil.copytree(worlds["fp32"].folder, Path(scratch) / "bf16"))
        shutil.rmtree(worlds["bf16"].cache)
        ran(worlds["bf16"].precompute(worlds["bf16"].cache, dtype="bf16"))
        for recipe, world in worlds.items():
            text += f"\n## {recipe}\n\n| start | log-probs, nats | allowed | D_F | allowed |\n"
            text += "| --- | --- | --- | --- | --- |\n"
            for number, (name, case) in enumerate(starts().items()):
                text += row(name, first_line(world, Path(scratch) / f"{recipe}-{number}", case))
    TABLE.write_text(text)


def first_line(world: World, folder: Path, case: Case) -> dict[str, Any]:
    """The metrics of a run's first step."""
    folder.mkdir()
    ran(world.align(folder / "out", "--allow-different-start", max_steps=1, **case(world, folder)))
    return metrics(folder / "out")[0]


def row(name: str, first: dict[str, Any]) -> str:
    """A row of the table."""
    cells = []
    for what in ("parity/logps", "parity/mse"):
        found, allowed = first[what], first[f"{what}_allowed"]
        cells += [f"**{found:.2g}**" if found > allowed else f"{found:.2g}", f"{allowed:.2g}"]
    return f"| {name} | {' | '.join(cells)} |\n"


if __name__ == "__main__":
    write_table()
