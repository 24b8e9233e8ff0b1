"""A policy in training computes what it computes in evaluation: nothing of it is random.

In: a configuration, a model. Out: the same without dropout, in a mode in which nothing else is random either; and a
check that a forward pass in that mode repeats itself. Parity with the cache is measured in evaluation mode, where
nothing of this shows.

The mode is evaluation, but for the modules that ask whether they train before they save memory: noise on routers,
skipped layers and whatever else there is stay off because their modules do not train. Of those few modules it is the
numbers that are set to 0. Only numbers of dropout are: others mean something in evaluation too (PhiMoE's router masks
by its `router_jitter_noise`).
"""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

# `attn_pdrop`, `hidden_dropout_prob`, `layerdrop`, …
DROPOUT = re.compile(r"drop", re.IGNORECASE)
# PEFT's own dropout is before the adapter alone, and there because somebody asked for it.
ASKED_FOR = "lora_dropout"


def silence_config(config: Any) -> None:
    """Sets every number of dropout in a configuration to 0, in its parts too.

    Args:
        config: of transformers; changed in place. The model that is built of it is saved with it.
    """
    from transformers import PreTrainedConfig

    for name, value in list(vars(config).items()):
        if isinstance(value, PreTrainedConfig):
            silence_config(value)
        elif DROPOUT.search(name) and _is_positive(value):
            setattr(config, name, 0.0)


def silence_modules(model: nn.Module) -> None:
    """Sets every number of dropout in a model's modules to 0: some are not in the configuration."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if DROPOUT.search(name) and _is_positive(value):
                setattr(module, name, 0.0)


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def policy_mode(model: nn.Module, *, checkpointing: bool) -> None:
    """Puts a policy into the mode that training uses.

    Args:
        model: the policy, perhaps wrapped.
        checkpointing: whether activations will be computed again in the backward, also where the model does not say
            so yet; the modules that do so have to train.
    """
    model.eval()
    for name, module in model.named_modules():
        saves_memory = getattr(module, "gradient_checkpointing", None)
        if ASKED_FOR in name or saves_memory or (checkpointing and saves_memory is not None):
            module.training = True


@torch.no_grad()
def check_repeats(model: nn.Module, score: Callable[[], Tensor], *, checkpointing: bool) -> None:
    """Checks that what training computes does not depend on the state of a random generator.

    Args:
        model: the policy, perhaps wrapped; put into training's mode meanwhile, but for an adapter's dropout.
        score: runs it and gives log-probabilities, nats.
        checkpointing: as `policy_mode`'s.

    Raises:
        ValueError: it does.
    """
    before = model.training
    policy_mode(model, checkpointing=checkpointing)
    for name, module in model.named_modules():
        if ASKED_FOR in name:
            module.eval()
    try:
        first, other = _seeded(score, 0), _seeded(score, 1)
        if torch.equal(first, other):
            return
        # Some kernels of GPUs add up in any order: they differ from themselves under one seed, and as much.
        found, own = (float((values - first).abs().max()) for values in (other, _seeded(score, 0)))
    finally:
        model.train(before)
    if found > 8 * own:  # of what is not finite, which the first step names with its pair, nothing is said here
        raise ValueError(
            f"model: expected one that computes the same in training as in evaluation, found log-probs that differ by "
            f"{found:.3g} nats from one seed to another; set what makes it random to 0 in its config.json"
        )


def _seeded(score: Callable[[], Tensor], seed: int) -> Tensor:
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        return score().detach().clone()
