"""How a decoder's layers run: compiled one by one, some of them checkpointed, with weights cast once if frozen.

In: a causal LM or its layers. Out: the same, changed in place. Whole sequences run compiled code; generation, token by
token, does not.

Shapes: L positions of a row, D hidden size.
"""

import types
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from . import flex
from .models import Recipe
from .sae import Site


def cast_weights(layers: Iterable[nn.Module], recipe: Recipe) -> None:
    """Casts to bf16, once, the weights that autocast would cast in every pass; results do not change.

    Args:
        layers: of a frozen decoder, whose linear layers are nn.Linear.
        recipe: the compute recipe; nothing is cast under "fp32".
    """
    if recipe != "bf16":
        return
    for layer in layers:
        for module in layer.modules():
            if type(module) is nn.Linear:
                for weight in module.parameters():
                    weight.data = weight.data.to(torch.bfloat16)


def compile_layers(layers: Iterable[nn.Module], sites: Sequence[Site] = ()) -> None:
    """Compiles decoder layers one by one: one graph with gradient and one without, for all layers and lengths.

    Activation checkpointing and hooks on layers stay outside the graphs. A layer with a site inside it is not compiled,
    because the hook would have to be compiled with it.

    Args:
        layers: of a decoder.
        sites: the sites that will be read.
    """
    inside = {site.layer for site in sites if site.kind != "resid_post"}
    for number, layer in enumerate(layers):
        if number not in inside:
            layer.forward = types.MethodType(_forward, layer)


def are_compiled(layers: Iterable[nn.Module]) -> bool:
    """Whether any of the layers is compiled."""
    return any(getattr(layer.forward, "__func__", None) is _forward for layer in layers)


def _forward(self: Any, hidden_1LD: Tensor, *args: Any, **kwargs: Any) -> Any:
    """A compiled layer's forward, by the interface of transformers."""
    if kwargs.get("past_key_values") is not None:
        return type(self).forward(self, hidden_1LD, *args, **kwargs)
    for tensor in (hidden_1LD, kwargs.get("position_ids"), *(kwargs.get("position_embeddings") or ())):
        if isinstance(tensor, Tensor):
            torch._dynamo.maybe_mark_dynamic(tensor, 1)
    # transformers wraps a layer's forward in checkpointing; the function inside is compiled.
    plain = getattr(type(self).forward, "__wrapped__", type(self).forward)
    run = partial(_compiled(plain, flex.BACKEND), self, **kwargs)
    if self.training and getattr(self, "gradient_checkpointing", False):
        return self._gradient_checkpointing_func(run, hidden_1LD, *args)
    return run(hidden_1LD, *args)


@cache
def _compiled(function: Callable[..., Any], backend: str) -> Any:
    return torch.compile(function, backend=backend)


class CheckpointEvery(TrainerCallback):
    """With activation checkpointing, lets only every n-th layer compute its activations again in the backward."""

    def __init__(self, layers: Iterable[Any], every: int) -> None:
        self._layers, self._every = layers, every

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Runs after the Trainer has switched checkpointing on for all layers."""
        if args.activation_checkpointing:
            for number, layer in enumerate(self._layers):
                layer.gradient_checkpointing = number % self._every == 0
