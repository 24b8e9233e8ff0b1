"""The card of a trained model or adapter: what a person, or a hub, reads first.

In: what it was trained from, and the settings. Out: the text of `README.md`, the same for the same training. The
licence is left to whoever publishes it.
"""

import importlib.metadata
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ..model.adapters import AdapterSource
from .config import RowConfig

VERSIONS = ("fpo", "torch", "transformers", "peft")

_CARD = """\
# {title}

{what}, trained with [fpo](https://arxiv.org/abs/2411.07618).

| | |
| --- | --- |
{rows}

## Use

```python
{use}
```

The chat template is the tokenizer's (`tokenizer.apply_chat_template`).

## Licence

None is given here. What the base model, the data and the SAEs allow holds for this {noun} too: name a licence in the
header above before you publish it.
"""
_USE = {
    False: """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")""",
    True: """\
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")""",
}


def is_adapter(model: Any) -> bool:
    """Whether what is saved of a model is an adapter."""
    return hasattr(model, "peft_config")


def model_card(base: str, facts: Mapping[str, str], *, adapter: bool) -> str:
    """The card of a model or an adapter.

    Args:
        base: hub id or path of the model that training began with.
        facts: what a reader has to know, by its name; `method` is one, and begins with the method's name.
        adapter: whether it is an adapter.
    """
    rows = [f"| {name} | {value} |" for name, value in {"base model": f"`{base}`", **facts}.items()]
    return _card(base, rows, adapter)


def card_of_merged(source: AdapterSource) -> str:
    """The card of a model that an adapter was merged into; the adapter's own says how that was trained."""
    path = source.folder / "README.md"
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    rows = [line for line in lines if re.fullmatch(r"\| (?!---).+ \|.* \|", line)]
    if not any(row.startswith("| method |") for row in rows):  # a card of somebody else's
        rows = [f"| base model | `{source.base.lasting_name}` |", "| method | lora |"]
    rows.append("| merged | a LoRA adapter, added into the weights of its base model |")
    return _card(source.base.lasting_name, rows, adapter=False)


def _card(base: str, rows: Sequence[str], adapter: bool) -> str:
    (method,) = (row.split("|")[2].split(",")[0].strip() for row in rows if row.startswith("| method |"))
    base = base or "a model without a name"
    name = base.rstrip("/").rsplit("/", 1)[-1]
    noun = "adapter" if adapter else "model"
    text = _CARD.format(
        title=f"{name}, {method}",
        what=f"A LoRA adapter for `{base}`" if adapter else f"`{base}`",
        rows="\n".join(rows),
        use=_USE[adapter],
        noun=noun,
    )
    header = ["library_name: " + ("peft" if adapter else "transformers"), "pipeline_tag: text-generation"]
    if re.fullmatch(r"[\w.-]+/[\w.-]+", base):  # a hub refuses a header that names anything else
        header += [f"base_model: {base}", f"base_model_relation: {'adapter' if adapter else 'finetune'}"]
    tags = ["fpo", "sft" if method == "sft" else "preference-optimization", *(["lora"] if adapter else [])]
    header += ["tags:", *(f"- {tag}" for tag in tags)]
    return "---\n" + "\n".join(header) + "\n---\n\n" + text


def training_facts(args: RowConfig, model: nn.Module) -> dict[str, str]:
    """Settings of a training that change its result.

    Args:
        args: the settings.
        model: what it began with, in its adapter if it has one.
    """
    settings = args.schedule_settings
    schedule = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    facts = {
        "length": f"{args.max_steps} steps" if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs",
        "batch": f"{batch} a step",
        "learning rate": f"{args.learning_rate:g}, {schedule} {settings or ''}".rstrip(),
        "warm-up": f"{args.warmup_steps:g}",
        "optimiser": getattr(args.optim, "value", str(args.optim)),
        "recipe": args.recipe,
        "seed": str(args.seed),
    }
    for settings in getattr(model, "peft_config", {}).values():
        targets = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in settings.target_modules}))
        facts["LoRA"] = (
            f"r = {settings.r}, α = {settings.lora_alpha:g}, dropout {settings.lora_dropout:g}, in {targets}"
        )
    facts["versions"] = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in VERSIONS)
    return facts
