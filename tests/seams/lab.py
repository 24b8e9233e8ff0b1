"""Commands run in this process on small inputs, each set of options once, and what they left.

In: the `World` of tiny_world.py. Out: `Run`s, and the pairs that their inputs hold, tokenised by hand.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from fpo.cache.reader import Cache, open_cache
from fpo.cache.schema import Pair
from pairs import calm_gemma2
from safetensors.torch import load_file
from tiny_tokenizers import gemma
from tiny_world import LIMITS, SITES, World, fpo, metrics, save_model, to_arguments, write_rows
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.gemma2 import modeling_gemma2

# Raw rows of the small training cache; none of them is skipped, so it holds three pairs.
SMALL = 3
SIDES = ("chosen", "rejected")
LENGTHS = {"max_length": LIMITS.max_length, "max_prompt_length": LIMITS.max_prompt_length}


@dataclass(frozen=True)
class Run:
    """What a command left.

    Attributes:
        folder: its `--out`.
        said: what it printed.
        start: the folder of the model that it started from.
    """

    folder: Path
    said: str
    start: Path

    @cached_property
    def log(self) -> list[dict[str, Any]]:
        return metrics(self.folder)

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The lines of optimiser steps."""
        return [line for line in self.log if "loss" in line]

    def logged(self, name: str) -> list[float]:
        return [line[name] for line in self.steps]

    def weights(self, step: int) -> dict[str, Tensor]:
        """The weights after a step; 0 is the start."""
        snapshot = self.folder / "snapshots" / f"step-{step:06d}"
        return load_file((self.start if step == 0 else snapshot if snapshot.exists() else self.folder) / WEIGHTS)

    def moved(self, step: int) -> dict[str, Tensor]:
        """By how much a step moved each weight."""
        before, after = self.weights(step - 1), self.weights(step)
        return {name: after[name] - before[name] for name in before}

    def model(self, step: int | None = None) -> PreTrainedModel:
        """The model at the end, or after a step."""
        snapshot = None if step is None else self.folder / "snapshots" / f"step-{step:06d}"
        return plain_model(snapshot if snapshot and snapshot.exists() else self.folder)

    def open(self, *sites: str) -> Cache:
        return open_cache(self.folder, sites=list(sites))

    @property
    def metrics(self) -> dict[str, float]:
        """What an evaluation found: the mean of each metric."""
        found = json.loads((self.folder / "metrics.json").read_text())["metrics"]
        return {name: value["mean"] for name, value in found.items()}


WEIGHTS = "model.safetensors"


class Lab:
    """Runs commands and remembers them.

    Attributes:
        world: models, SAEs, data and caches.
        folder: for all that is written.
        compared: what comparison.py made, by call.
    """

    def __init__(self, world: World, folder: Path) -> None:
        self.world, self.folder = world, folder
        self.compared: dict[str, Any] = {}
        self._done: dict[str, Run] = {}
        self._made = 0

    def new(self, name: str = "out") -> Path:
        """A folder that is not there yet."""
        self._made += 1
        return self.folder / f"{self._made:03d}-{name}"

    # What commands read.

    @cached_property
    def chats(self) -> Path:
        """Conversations of one answer: the questions and better answers of the training data."""
        turns = [row["chosen"] for row in self.rows]
        return write_rows(self.folder / "chats.jsonl", [{"messages": messages} for messages in turns])

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """The raw rows of the training data."""
        return lines_of(self.world.data)

    @cached_property
    def other(self) -> Path:
        """A model like the world's with other weights."""
        return save_model(self.folder / "other", calm_gemma2, gemma(), seed=1)

    @cached_property
    def small_cache(self) -> Path:
        return self.run("precompute").folder

    def pairs(self, rows: Sequence[dict[str, Any]] | None = None, *, limit: int = SMALL) -> list[Pair]:
        """The first rows' pairs, tokenised by hand and cut to the lab's lengths."""
        return by_hand((self.rows if rows is None else rows)[:limit])

    # Running.

    def defaults(self, command: str, options: dict[str, Any]) -> dict[str, Any]:
        """Options of a small run: one step an epoch, of all that there is."""
        data = {"dataset": self.world.data, "split": "train"}
        training = {"lr": 1e-3, "warmup_steps": 0, "batch_size": SMALL, "logging_steps": 1, "snapshot_steps": 1}
        training |= {} if "epochs" in options else {"max_steps": 1}
        if options.get("lora_r"):
            del training["snapshot_steps"]
        model = {"model": self.world.gemma}
        found: dict[str, Any] = {
            "precompute": lambda: (
                model
                | data
                | LENGTHS
                | {"sae": self.world.saes, "limit": SMALL}
                | {"keep_features": "all", "token_budget": 160}
            ),
            "align": lambda: model | training | {"cache": self.small_cache, "method": "dpo", "token_budget": 160},
            "sft": lambda: (
                model | training | {"dataset": self.chats, "limit": SMALL, "max_length": 64} | {"token_budget": 160}
            ),
            "evaluate": lambda: {"model": self.other, "cache": self.small_cache, "prompts": 0, "token_budget": 160},
            "train-sae": lambda: (
                model | data | LENGTHS | {"site": SITES[0].name, "width": 48, "tokens": 1024} | {"target_l0": 8}
            ),
        }[command]()
        method = options.get("method", found.get("method"))
        if method == "fpo" or options.get("sae"):
            found |= {"sae": self.world.saes, "site": SITES[0].name} if command != "precompute" else {}
        elif method in ("tdpo1", "tdpo2", "simpo-kl") and command == "align":
            found |= {"reference": self.world.gemma}
        return found

    def arguments(self, command: str, out: Path, *more: object, **options: Any) -> list[str]:
        """The command line of a small run; None takes an option out, False switches it off."""
        values = self.defaults(command, options) | {"out": out} | options
        off = [f"--no-{name.replace('_', '-')}" for name, value in values.items() if value is False]
        kept = {name: value for name, value in values.items() if value is not False}
        return [command, *to_arguments(kept), *off, *map(str, more)]

    def call(self, command: str, out: Path, *more: object, **options: Any) -> Result:
        """Runs a command, whatever comes of it."""
        return fpo(*self.arguments(command, out, *more, **options))

    def run(self, command: str, **options: Any) -> Run:
        """Runs a command that has to succeed; the same options give the same run."""
        key = repr((command, sorted(options.items())))
        if key not in self._done:
            out = self.new(command)
            result = self.call(command, out, **options)
            assert result.exit_code == 0, result.output
            start = self.defaults(command, options) | options
            self._done[key] = Run(out, result.stdout, Path(str(start.get("model"))))
        return self._done[key]

    def refused(self, command: str, **options: Any) -> str:
        """Runs a command that has to be refused before it writes anything; its line."""
        out = self.new("refused")
        result = self.call(command, out, **options)
        said = [line for line in result.stderr.splitlines() if line.startswith("fpo: ")]  # beside progress bars
        assert (result.exit_code, len(said)) == (2, 1), result.output
        assert not out.exists() or not any(out.iterdir())
        return said[0]


def tokens(text: str) -> list[int]:
    """Token ids of text in which the special tokens are written out."""
    ids: list[int] = gemma()(text, add_special_tokens=False).input_ids
    return ids


def lines_of(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def in_turns(question: str) -> str:
    """A prompt in Gemma's turns, with the opening of the answer."""
    return f"<bos><start_of_turn>user\n{question}<end_of_turn>\n<start_of_turn>model\n"


def bracket_template(opening: str = "") -> str:
    """A chat template of other turns, after an opening of its own."""
    turn = "[{{ m['role'] }}]{{ '\\n' }}{{ m['content'] }}<end_of_turn>"
    asked = "{% if add_generation_prompt %}{{ '[assistant]\\n' }}{% endif %}"
    return "{{ bos_token }}" + opening + "{% for m in messages %}" + turn + "{% endfor %}" + asked


def in_brackets(question: str, opening: str = "") -> str:
    """A prompt in that template, with the opening of the answer."""
    return f"<bos>{opening}[user]\n{question}<end_of_turn>[assistant]\n"


def by_hand(
    rows: Sequence[dict[str, Any]],
    *,
    max_length: int = LIMITS.max_length,
    max_prompt_length: int = LIMITS.max_prompt_length,
    render: Callable[[str], str] = in_turns,
) -> list[Pair]:
    """Pairs of rows as message lists: a prompt keeps BOS and its end, a response its beginning.

    Rows whose responses are equal or empty are left out.
    """
    found = []
    for row in rows:
        question, texts = row["chosen"][0]["content"], [row[side][1]["content"].strip() for side in SIDES]
        if "" in texts or texts[0] == texts[1]:
            continue
        prompt = tokens(render(question))
        if len(prompt) > max_prompt_length:
            prompt = [prompt[0], *prompt[len(prompt) - max_prompt_length + 1 :]]
        sides = [tokens(f"{text}<end_of_turn>")[: max_length - len(prompt)] for text in texts]
        if sides[0] != sides[1]:
            found.append(Pair("by hand", *(np.array(ids, np.int32) for ids in (prompt, *sides))))
    return found


def plain_model(folder: Path) -> PreTrainedModel:
    """A saved model as transformers loads it."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    return model.eval()


@dataclass
class Passes:
    """What went through the models while it was watched.

    Attributes:
        rows: tokens of each row that went through a decoder with gradient.
        layers: how often a layer's MLP ran with gradient, recomputation included.
        scored: tokens of each row that went through without gradient.
    """

    rows: list[int]
    layers: int
    scored: list[int]


@contextmanager
def watched_passes() -> Iterator[Passes]:
    """Counts the passes of Gemma-2 models."""
    found = Passes([], 0, [])
    body, mlp = modeling_gemma2.Gemma2Model.forward, modeling_gemma2.Gemma2MLP.forward

    def of_body(self: Any, input_ids: Any = None, *args: Any, **kwargs: Any) -> Any:
        (found.rows if torch.is_grad_enabled() else found.scored).append(input_ids.shape[-1])
        return body(self, input_ids, *args, **kwargs)

    def of_mlp(self: Any, *args: Any) -> Any:
        found.layers += torch.is_grad_enabled()
        return mlp(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling_gemma2.Gemma2Model, "forward", of_body)
        patch.setattr(modeling_gemma2.Gemma2MLP, "forward", of_mlp)
        yield found
