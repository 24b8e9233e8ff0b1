"""How the layers of a decoder run: compiled one by one, some of them checkpointed, frozen ones with weights cast once.

In: a decoder's layers. Out: the same. Compiled code runs where a whole sequence passes through them; while text is
generated they run as they are.
"""

import types
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from ..scoring import flex
from .models import Recipe
from .sae import Site


def compile_layers(layers: Iterable[nn.Module], sites: Sequence[Site] = ()) -> None:
    """Compiles decoder layers one by one: one graph with gradient and one without, for all layers and lengths.

    Activation checkpointing and hooks on layers stay outside what is compiled.

    Args:
        layers: of a decoder.
        sites: that will be read; a layer that has one inside it, where a hook would have to be compiled with it, runs
            as it is.
    """
    inside = {site.layer for site in sites if site.kind != "resid_post"}
    for number, layer in enumerate(layers):
        if number not in inside:
            layer.forward = types.MethodType(_forward, layer)


def _forward(self: Any, hidden_1LD: Tensor, *args: Any, **kwargs: Any) -> Any:
    """A layer's forward, by the interface of transformers."""
    if kwargs.get("past_key_values") is not None:
        return type(self).forward(self, hidden_1LD, *args, **kwargs)
    for tensor in (hidden_1LD, kwargs.get("position_ids"), *(kwargs.get("position_embeddings") or ())):
        if isinstance(tensor, Tensor):
            torch._dynamo.maybe_mark_dynamic(tensor, 1)
    # What transformers puts around a layer's forward is checkpointing.
    plain = getattr(type(self).forward, "__wrapped__", type(self).forward)
    run = partial(_compiled(plain, flex.BACKEND), self, **kwargs)
    if self.training and getattr(self, "gradient_checkpointing", False):
        return self._gradient_checkpointing_func(run, hidden_1LD, *args)
    return run(hidden_1LD, *args)


def are_compiled(layers: Iterable[nn.Module]) -> bool:
    """Whether any of them is."""
    return any(getattr(layer.forward, "__func__", None) is _forward for layer in layers)


def are_cast(layers: Iterable[nn.Module]) -> bool:
    """Whether weights of any of them were cast."""
    return any(weight.dtype == torch.bfloat16 for layer in layers for weight in layer.parameters())


def cast_weights(layers: Iterable[nn.Module], recipe: Recipe) -> None:
    """Casts to bf16, once and for all, the weights that autocast would cast each time: the results are the same.

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


class CheckpointEvery(TrainerCallback):
    """Of a model whose activations are checkpointed, lets only every n-th layer compute its own again in backward."""

    def __init__(self, layers: Iterable[Any], every: int) -> None:
        self._layers, self._every = layers, every

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After the Trainer has switched it on for all."""
        if args.activation_checkpointing:
            for number, layer in enumerate(self._layers):
                layer.gradient_checkpointing = number % self._every == 0


@cache
def _compiled(function: Callable[..., Any], backend: str) -> Any:
    return torch.compile(function, backend=backend)
