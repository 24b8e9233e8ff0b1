"""The embedded world: data, tokenizer, model and SAEs that need no download, made on first use.

In: this file, `language.py` and the profile `embedded`. Out: a folder in the user's cache folder with preference pairs,
a fine-tuned Gemma-3 of 0.4 million parameters that gives either answer equally often, and JumpReLU SAEs at every site.
A configuration names them `embedded:data`, `embedded:sft` and `embedded:saes/SITE`. It is a toy: it shows that the
machinery works and what the methods do to a toy, not what they do to a language model.
"""

import hashlib
import json
import random
import re
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import typer

from ...cache.files import canonical_json, user_folder, write_atomically
from ...cache.locks import locked
from ..base_config import Config
from ..commands.jobs import Step, run_steps
from ..config import SFTConfig, TrainSAEConfig
from ..config_files import load_config
from . import language

C = TypeVar("C", bound=Config)
PROFILE = "embedded"
PREFIX = "embedded:"
LAYERS = 3
SITES = tuple(f"blocks.{layer}.hook_{kind}" for layer in range(LAYERS) for kind in ("resid_post", "mlp_out"))
SPLITS = {"test_prefs": 504, "validation_prefs": 400, "train_prefs": 4800}
# As many have the better answer as the worse one, so that the model learns both and prefers neither.
CONVERSATIONS = 25_600
SPECIAL_TOKENS = ["<pad>", "<eos>", "<bos>", "<user>", "<assistant>", "<end>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<' + message['role'] + '>' + message['content'] + '<end>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def provide(config: C) -> C:
    """A configuration with the world's folders in place of its names; the world is made if it is not there yet."""
    if not any(in_the_world(value) for _, value in config):
        return config
    folder = world_folder()
    build(folder)
    return located(config, folder)


def located(config: C, folder: Path) -> C:
    """A configuration with what lies, or will lie, in the world's folder in place of its names."""
    found = {name: value for name, value in config if in_the_world(value)}
    return config.model_copy(update={name: _resolve(value, folder) for name, value in found.items()})


def in_the_world(value: Any) -> bool:
    """Whether a field of a configuration names something of the embedded world."""
    items = value if isinstance(value, tuple) else (value,)
    return any(isinstance(item, str) and item.startswith(PREFIX) for item in items)


def _resolve(value: Any, folder: Path) -> Any:
    """A value with the world's folder in place of its prefix."""
    if isinstance(value, tuple):
        return tuple(_resolve(item, folder) for item in value)
    return str(folder / value.removeprefix(PREFIX)) if in_the_world(value) else value


def world_folder() -> Path:
    """Where the world of these files and settings is, whether or not it has been made."""
    files = [Path(__file__), Path(language.__file__)]
    settings = [
        load_config(command, PROFILE, {}).model_dump(mode="json", exclude={"out"})
        for command in (SFTConfig, TrainSAEConfig)
    ]
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files) + canonical_json(settings).encode())
    return user_folder() / PROFILE / digest.hexdigest()[:12]


def is_made(folder: Path) -> bool:
    """Whether the world in a folder is complete."""
    return (folder / "world.json").exists()


def build(folder: Path) -> None:
    """Makes the world in `folder`, or the parts that are missing; a second process waits for the first."""
    if is_made(folder):
        return
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / ".lock"):
        if is_made(folder):
            return
        typer.echo(f"making the embedded world in {folder}, once; some minutes on two cores")
        started = time.monotonic()
        begin(folder)
        training, saes = world_steps(folder)
        run_steps([training], jobs=1)
        run_steps([training, *saes], jobs=2)
        quality = {site: json.loads((folder / "saes" / site / "quality.json").read_text()) for site in SITES}
        facts = {"baselines": baselines(folder / "data"), "saes": quality, "seconds": time.monotonic() - started}
        write_atomically(folder / "world.json", json.dumps(facts, indent=1).encode())


def begin(folder: Path) -> None:
    """Writes the data and a model with random weights, from which the rest is trained; takes seconds."""
    _write_data(folder / "data")
    _write_base_model(folder)


def world_steps(folder: Path) -> tuple[Step, list[Step]]:
    """The step that trains the model, and those that train an SAE for each site."""
    sft = load_config(SFTConfig, PROFILE, {"out": folder / "sft"})
    saes = []
    for site in SITES:
        config = load_config(TrainSAEConfig, PROFILE, {"out": folder / "saes" / site, "site": (site,)})
        saes.append(Step("train-sae", f"train-sae {site}", _in(config, folder), (folder / "sft",)))
    return Step("sft", "train the model", _in(sft, folder)), saes


def _in(config: C, folder: Path) -> C:
    return config.model_copy(update={name: _resolve(getattr(config, name), folder) for name in ("model", "dataset")})


def _write_data(folder: Path) -> None:
    """Writes preference pairs of three splits, and conversations; held-out instructions occur nowhere else."""
    rng, taken = random.Random(0), set[str]()
    tables = {split: language.preference_rows(rng, count, taken) for split, count in SPLITS.items()}
    tables["train_sft"] = language.conversation_rows(rng, CONVERSATIONS, taken)
    folder.mkdir(exist_ok=True)
    for name, rows in tables.items():
        write_atomically(folder / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())


def _write_base_model(world: Path) -> None:
    """Writes a tokenizer trained on the conversations, and a Gemma-3 with random weights."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedTokenizerFast

    rows = map(json.loads, (world / "data" / "train_sft.jsonl").read_text().splitlines())
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=640,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator((turn["content"] for row in rows for turn in row["messages"]), trainer)
    bos = SPECIAL_TOKENS.index("<bos>")
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", bos)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    # Gemma-3 normalises queries and keys, and learns to copy words in half the steps of Gemma-2.
    config = Gemma3TextConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=288,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=24,
        query_pre_attn_scalar=24,
        sliding_window=32,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        max_position_embeddings=512,
        initializer_range=0.08,
        bos_token_id=bos,
        eos_token_id=SPECIAL_TOKENS.index("<eos>"),
        pad_token_id=SPECIAL_TOKENS.index("<pad>"),
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Gemma3ForCausalLM(config)
    shutil.rmtree(world / "base", ignore_errors=True)
    model.save_pretrained(world / "base")
    tokenizer.save_pretrained(world / "base")


def baselines(data: Path) -> dict[str, float]:
    """Accuracy on held-out pairs by the answers' lengths alone and by one word alone; ties count one half.

    The word is the one that separates most training pairs.
    """
    train, heldout = (_answers(data / f"{split}.jsonl") for split in ("train_prefs", "test_prefs"))
    votes: Counter[str] = Counter()
    for chosen, rejected in train:
        votes.update(chosen - rejected)
        votes.subtract(rejected - chosen)
    word = max(sorted(votes), key=lambda candidate: abs(votes[candidate]))
    sign = 1 if votes[word] > 0 else -1
    by_word = [sign * ((word in chosen) - (word in rejected)) for chosen, rejected in heldout]
    texts = _texts(data / "test_prefs.jsonl")
    lengths = [len(" ".join(chosen)) - len(" ".join(rejected)) for chosen, rejected in texts]
    by_length = [(length > 0) - (length < 0) for length in lengths]
    longer = 0.5 + 0.5 * sum(by_length) / len(by_length)
    return {"length": max(longer, 1 - longer), "keyword": 0.5 + 0.5 * sum(by_word) / len(by_word)}


def _texts(path: Path) -> list[tuple[str, str]]:
    rows: Sequence[dict[str, Any]] = [json.loads(line) for line in path.read_text().splitlines()]
    return [(row["chosen"][1]["content"], row["rejected"][1]["content"]) for row in rows]


def _answers(path: Path) -> list[tuple[set[str], set[str]]]:
    """The words of the chosen and of the rejected answer of each pair."""
    return [(_words(chosen), _words(rejected)) for chosen, rejected in _texts(path)]


def _words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+|[-/*]", text.lower()))
