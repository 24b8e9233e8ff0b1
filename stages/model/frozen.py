"""A model that never changes: checked, and as fast as one that is only read can be.

In: a causal LM with fp32 weights. Out: the same, with weights that autocast would cast cast once, and compiled layers.
"""

from collections.abc import Sequence
from typing import Any

from ..scoring.forward import causal_lm
from .anatomy import decoder_layers
from .compile import are_cast, are_compiled, cast_weights, compile_layers
from .models import Recipe
from .sae import Site
from .supported import check_model


def freeze(model: Any, recipe: Recipe, *, compiled: bool, sites: Sequence[Site] = ()) -> None:
    """Checks a model that will only be read, and prepares it; once is enough.

    Args:
        model: the causal LM, on its device.
        recipe: the compute recipe.
        compiled: whether its layers are compiled.
        sites: that will be read.

    Raises:
        ValueError: if it is not supported.
    """
    model.requires_grad_(False).eval()
    layers = decoder_layers(causal_lm(model))
    if are_compiled(layers) or are_cast(layers):
        return
    check_model(model)  # while its weights are fp32
    cast_weights(layers, recipe)
    if compiled:
        compile_layers(layers, sites)
