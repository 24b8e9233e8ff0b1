"""A world that fits in a temporary folder: models, SAEs, preference data, caches, and the command line to run on them.

The fixture `world` is of session scope and read-only; a test that writes asks for its own folder.
"""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from click.testing import Result
from fpo.cache.reader import Cache, open_cache
from fpo.pipeline.cli import app
from fpo.stages.data.chat import ChatFormat
from fpo.stages.data.preferences import Preferences, load_preferences
from fpo.stages.data.tokenize import Limits
from fpo.stages.model.models import find_model, load_model
from fpo.stages.model.sae import Site, SiteSAE, load_sae
from fpo.stages.model.tokenizer import load_tokenizer
from fpo.stages.precompute.reference import Reference
from pairs import calm_gemma2, calm_llama
from tiny import save_tiny_sae
from tiny_tokenizers import chatml, gemma
from typer.testing import CliRunner

SITES = (Site(2, "resid_post"), Site(1, "mlp_out"))
LIMITS = Limits(max_length=64, max_prompt_length=32)
WORDS = "What is the capital of France? It is Paris, I think. Lyon is not it; the user asks, the model tells."
# Raw row -> the reason for which it is skipped.
SKIPPED = {3: "identical responses", 7: "empty response"}
TIES = (5,)


@dataclass(frozen=True)
class World:
    """Where things lie.

    Attributes:
        gemma: a Gemma-2 model with its tokenizer.
        llama: a Llama model with another tokenizer.
        saes: folders of the SAEs at `SITES`.
        data: 14 preference rows, two of which are skipped.
        heldout: 7 more.
        cache: of `data` under `gemma`, 4 raw rows a shard, all features kept.
        eval_cache: of `heldout`, likewise.
    """

    folder: Path

    def __getattr__(self, name: str) -> Path:
        return self.folder / {"data": "data.jsonl", "heldout": "heldout.jsonl"}.get(name, name)

    @property
    def saes(self) -> tuple[Path, Path]:
        return self.folder / "sae_0", self.folder / "sae_1"

    def precompute(self, out: Path, *changes: str, **options: Any) -> Result:
        """`fpo precompute` of the training data."""
        return fpo(*self.to_precompute(out, **options), *changes)

    def to_precompute(self, out: Path, **options: Any) -> list[str]:
        """Its arguments, for a process of its own."""
        defaults = {
            "model": self.gemma,
            "dataset": self.data,
            "sae": self.saes,
            "split": "train",
            "max_length": LIMITS.max_length,
            "max_prompt_length": LIMITS.max_prompt_length,
            "keep_features": "all",
            "token_budget": 160,
            "shard_size": 4,
        }
        return ["precompute", *to_arguments(defaults | options | {"out": out})]

    def align(self, out: Path, *changes: str, method: str = "fpo", **options: Any) -> Result:
        """`fpo align` on the cache: six pairs a step, two steps an epoch."""
        return fpo(*self.to_align(out, method, **options), *changes)

    def to_align(self, out: Path, method: str = "fpo", **options: Any) -> list[str]:
        """Its arguments, for a process of its own."""
        defaults: dict[str, Any] = {"model": self.gemma, "cache": self.cache, "method": method}
        defaults |= {"batch_size": 6, "lr": 1e-3, "warmup_steps": 0, "logging_steps": 1, "token_budget": 160}
        if method == "fpo":
            defaults |= {"sae": self.saes, "site": SITES[0].name}
        elif method in ("tdpo1", "tdpo2", "simpo-kl"):
            defaults |= {"reference": self.gemma}
        return ["align", *to_arguments(defaults | options | {"out": out})]

    def reference(self, sites: Sequence[int] = (0, 1)) -> Reference:
        """The reference as stage one takes it."""
        source = find_model(str(self.gemma))
        model = load_model(source, attention="packed", device="cpu")
        saes = tuple(self.load_sae(site) for site in sites)
        return Reference(source, model, ChatFormat(load_tokenizer(source)), saes, "fp32")

    def load_sae(self, number: int = 0) -> SiteSAE:
        return load_sae(str(self.saes[number]))

    def preferences(self, limit: int | None = None) -> Preferences:
        return load_preferences(str(self.data), split="train", limit=limit)

    def open(self, sites: Sequence[int] = (0,), name: str = "cache") -> Cache:
        return open_cache(self.folder / name, sites=[SITES[site].name for site in sites])

    def policy(self, attention: str = "packed") -> Any:
        return load_model(find_model(str(self.gemma)), attention=attention, device="cpu")


def to_arguments(options: dict[str, Any]) -> list[str]:
    """Options by field name; a tuple is repeated, None is left out, True is a flag."""
    arguments = []
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        for item in value if isinstance(value, tuple) else (value,):
            if item is not None:
                arguments += [flag] if item is True else [flag, str(item)]
    return arguments


def fpo(*arguments: object) -> Result:
    """Runs the command line in this process; anything but a clean exit is raised."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


def ran(result: Result) -> Result:
    """Checks that a command succeeded."""
    assert result.exit_code == 0, result.output
    return result


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in metrics(run) if "loss" in line]


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its bytes; none if there is no folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def state_of(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file with its bytes and the time at which it was written; folders too."""
    return {
        str(path): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in (folder, *sorted(folder.rglob("*")))
    }


def rows(seed: int, count: int) -> list[dict[str, Any]]:
    """Preference rows as message lists, with scores."""
    rng = random.Random(seed)

    def text(longest: int) -> str:
        return " ".join(rng.choices(WORDS.split(), k=rng.randint(1, longest)))

    made = []
    for _ in range(count):
        question = [{"role": "user", "content": text(6)}]
        sides = [[*question, {"role": "assistant", "content": text(12) + end}] for end in (" Yes.", " No.")]
        made.append({"chosen": sides[0], "rejected": sides[1], "score_chosen": 8.0, "score_rejected": 5.0})
    return made


def write_rows(path: Path, made: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


def save_model(folder: Path, make: Callable[..., Any], tokenizer: Any, **overrides: Any) -> Path:
    """Saves a tiny model with a tokenizer, its vocabulary as large as the tokenizer's."""
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    make(vocab_size=len(tokenizer), **(special | overrides)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_world(folder: Path) -> World:
    """Makes the models, the SAEs, the data and, by the command line, the caches."""
    world = World(folder)
    save_model(world.gemma, calm_gemma2, gemma())
    save_model(world.llama, calm_llama, chatml())
    for number, (folder, site) in enumerate(zip(world.saes, SITES, strict=True)):
        save_tiny_sae(folder, 32, 64, number, "jumprelu", site)
    made = rows(0, 14)
    made[3]["rejected"] = made[3]["chosen"]
    made[7]["chosen"] = [made[7]["chosen"][0], {"role": "assistant", "content": " "}]
    made[5]["score_rejected"] = made[5]["score_chosen"]
    write_rows(world.data, made)
    write_rows(world.heldout, rows(1, 7))
    ran(world.precompute(world.cache))
    ran(world.precompute(world.eval_cache, dataset=world.heldout, split="test"))
    return world
