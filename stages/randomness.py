"""A policy in training mode computes what it computes in evaluation: nothing of it is random.

In: a configuration, a model. Out: the same without dropout, skipped layers and noise on routers, whatever they are
called; and a check that a forward pass in the mode that training uses repeats itself. Parity with the cache is measured
in evaluation mode, where none of this shows.
"""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

# `attn_pdrop`, `hidden_dropout_prob`, `layerdrop`, `router_jitter_noise`, `moe_jitter_eps`, …
RANDOM = re.compile(r"drop|jitter", re.IGNORECASE)
# PEFT's own dropout is before the adapter alone, and there because somebody asked for it.
ASKED_FOR = "lora_dropout"


def silence_config(config: Any) -> None:
    """Sets every number of a configuration that makes a model random to 0, in its parts too.

    Args:
        config: of transformers; changed in place. The model that is built of it is saved with it.
    """
    from transformers import PreTrainedConfig

    for name, value in list(vars(config).items()):
        if isinstance(value, PreTrainedConfig):
            silence_config(value)
        elif RANDOM.search(name) and _is_positive(value):
            setattr(config, name, 0.0)


def silence_modules(model: nn.Module) -> None:
    """Sets every number of a model's modules that makes them random to 0: some are not in the configuration."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if RANDOM.search(name) and _is_positive(value):
                setattr(module, name, 0.0)


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


@torch.no_grad()
def check_repeats(model: nn.Module, score: Callable[[], Tensor]) -> None:
    """Checks that what training computes does not depend on the state of a random generator.

    Args:
        model: the policy, perhaps wrapped; put into training mode meanwhile.
        score: runs it and gives log-probabilities, nats.

    Raises:
        ValueError: it does.
    """
    before = model.training
    model.train()
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
