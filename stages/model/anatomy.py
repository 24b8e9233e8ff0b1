"""What a causal language model is made of, found by running it once.

In: a causal LM. Out: its decoder layers; how its head's output becomes logits; which module of a layer computes what
the MLP adds to the residual stream, and whether a layer's output is that stream. Names are not relied on: architectures
scale residuals, heads and logits under many of them.

Shapes: S tokens of a probe, D hidden size, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

# Relative to the largest entry of what is compared: far above what fp32 rounds, far below a factor that was missed.
TOLERANCE = 1e-4
PROBE_TOKENS = 8


@dataclass(frozen=True, eq=False)
class Anatomy:
    """How a model is built.

    Attributes:
        scale: logits are `scale` times the head's output, then soft-capped.
        softcap: final logit soft-capping `c·tanh(logits/c)`; None for none.
        resid_post: per layer, whether its output is what goes into the next one (or into the final norm).
        mlp_out: per layer, the name of the part whose output is what the MLP adds to the residual stream; None if no
            part's is.
    """

    scale: float
    softcap: float | None
    resid_post: tuple[bool, ...]
    mlp_out: tuple[str | None, ...]


_KNOWN: WeakKeyDictionary[nn.Module, Anatomy] = WeakKeyDictionary()


def anatomy(model: Any) -> Anatomy:
    """How a model is built; found by a forward pass of a few tokens, and remembered as long as the model lives.

    Args:
        model: a causal LM; of a PEFT model, the model inside.

    Raises:
        ValueError: if it has no one list of decoder layers, or its logits are not its head's output, scaled by a number
            of its configuration and soft-capped.
    """
    if model not in _KNOWN:
        with torch.no_grad(), quiet(model):
            _KNOWN[model] = _examine(model)
    return _KNOWN[model]


def decoder_layers(model: Any) -> nn.ModuleList:
    """The decoder's layers, whatever the architecture calls them (`layers`, `h`, `block`, …).

    Raises:
        ValueError: if there is no one list of as many modules as the configuration has layers.
    """
    decoder = model.get_decoder()
    if not hasattr(decoder, "config"):
        raise ValueError(
            f"model {model.config.model_type}: expected a decoder, found a {type(decoder).__name__}; this architecture "
            "is not supported"
        )
    number = getattr(decoder.config.get_text_config(decoder=True), "num_hidden_layers", None)
    lists = [part for part in decoder.modules() if isinstance(part, nn.ModuleList) and len(part) == number]
    outer = [part for part in decoder.children() if part in lists]
    if len(outer or lists) != 1:
        raise ValueError(
            f"model {model.config.model_type}: expected one list of {number} layers in {type(decoder).__name__}, found "
            f"{len(outer or lists)} such lists; this architecture is not supported"
        )
    found: nn.ModuleList = (outer or lists)[0]
    return found


def probe_ids(model: Any, tokens: int, seed: int) -> Tensor:
    """Random token ids [tokens] on the model's device, of ordinary tokens: special ones tend to come first."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())  # either may have rows to spare
    vocabulary = min(end.weight.shape[0] for end in ends)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(min(3, vocabulary - 1), vocabulary, (tokens,), generator=generator)
    return ids.to(next(model.parameters()).device)


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Runs what it encloses in eval mode and without autocast, and leaves the model as it was."""
    training = [part for part in model.modules() if part.training]
    model.eval()
    try:
        with torch.autocast(next(model.parameters()).device.type, enabled=False):
            yield
    finally:
        for part in training:
            part.training = True


@dataclass
class _Seen:
    """What one layer took in, put out, and had its parts put out, in turn."""

    entered: Tensor
    left: Any
    parts: list[tuple[str, Any]]


def _examine(model: Any) -> Anatomy:
    layers, decoder = decoder_layers(model), model.get_decoder()
    seen: list[list[_Seen]] = [[] for _ in layers]
    last: list[Any] = []
    after: list[tuple[Any, Any]] = []  # what the decoder's own parts, the final norm among them, made of what
    with ExitStack() as hooks:

        def watch(part: nn.Module, note: Any) -> None:
            hooks.callback(part.register_forward_hook(note).remove)

        watch(decoder, lambda module, args, output: last.append(_first(output)))
        for part in decoder.children():
            if not isinstance(part, nn.ModuleList):
                watch(part, lambda module, args, output: after.append((_first(args), _first(output))))
        for number, layer in enumerate(layers):
            for handle in _watch(layer, seen[number]):
                hooks.callback(handle.remove)
        scale, softcap = _head(model, last)
    resid_post = []
    for number, calls in enumerate(seen):
        once = len(calls) == 1 and isinstance(calls[0].left, Tensor) and calls[0].left.ndim == 3
        if once and number + 1 < len(seen):
            once = len(seen[number + 1]) == 1 and _is(seen[number + 1][0].entered, calls[0].left)
        elif once:
            ends = [(calls[0].left, calls[0].left), *after]
            once = any(_is(taken, calls[0].left) and _is(made, last[0]) for taken, made in ends)
        resid_post.append(once)
    mlp_out = [_mlp_out(layer, calls) for layer, calls in zip(layers, seen, strict=True)]
    return Anatomy(scale, softcap, tuple(resid_post), tuple(mlp_out))


def _watch(layer: nn.Module, seen: list[_Seen]) -> list[Any]:
    """Hooks that note what a layer and its parts do.

    A weight that is not finite makes everything after it so, and then any part looks right; such numbers are replaced
    on their way. They are named with their pair when it is scored.
    """

    def enters(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        if args:
            args = (_made_finite(args[0]), *args[1:])
        elif "hidden_states" in kwargs:
            kwargs = kwargs | {"hidden_states": _made_finite(kwargs["hidden_states"])}
        seen.append(_Seen(args[0] if args else kwargs.get("hidden_states"), None, []))
        return args, kwargs

    def leaves(module: nn.Module, args: Any, output: Any) -> None:
        seen[-1].left = _first(output)

    def part(name: str) -> Any:
        def makes(module: nn.Module, args: Any, output: Any) -> Any:
            output = (_made_finite(output[0]), *output[1:]) if isinstance(output, tuple) else _made_finite(output)
            if seen:
                seen[-1].parts.append((name, _first(output)))
            return output

        return makes

    handles = [layer.register_forward_pre_hook(enters, with_kwargs=True), layer.register_forward_hook(leaves)]
    return handles + [child.register_forward_hook(part(name)) for name, child in layer.named_children()]


def _made_finite(values: Any) -> Any:
    """The same, or random numbers where a tensor is not finite."""
    if not isinstance(values, Tensor) or not values.is_floating_point() or bool(values.isfinite().all()):
        return values
    generator = torch.Generator().manual_seed(0)
    return torch.randn(values.shape, generator=generator).to(values)


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple | dict) and len(output) else output


def _is(found: Any, expected: Tensor) -> bool:
    return isinstance(found, Tensor) and found.shape == expected.shape and _near(found, expected, 0.0)


def _near(found: Tensor, expected: Tensor, allowed: float) -> bool:
    """Whether two tensors differ by no more; what is not finite is no difference, it is named when pairs are scored."""
    off = (found - expected).abs()
    return not bool((off[off.isfinite()] > allowed).any())


def _largest(values: Tensor) -> float:
    return float(torch.where(values.isfinite(), values.abs(), 0.0).max())


def _close(found: Tensor, expected: Tensor, of: Tensor) -> bool:
    """Whether two tensors are the same up to rounding, and to `TOLERANCE` of `of`'s largest entry."""
    rounding = 8 * torch.finfo(found.dtype).eps * _largest(expected)
    return _near(found, expected, TOLERANCE * _largest(of) + rounding)


def _mlp_out(layer: nn.Module, calls: list[_Seen]) -> str | None:
    """The part whose output is added last: what came in + an earlier part's output + its output is what leaves."""
    if len(calls) != 1 or not isinstance(calls[0].entered, Tensor):
        return None
    entered, left = calls[0].entered, calls[0].left
    parts = [(name, out) for name, out in calls[0].parts if isinstance(out, Tensor) and out.shape == entered.shape]
    for number, (name, added) in enumerate(parts):
        if any("Attention" in type(part).__name__ for part in layer.get_submodule(name).modules()):
            continue
        smaller = [min(added, other, key=_largest) for _, other in parts[:number]]
        for (_, other), small in zip(parts[:number], smaller, strict=True):
            if _close(entered + other + added, left, small):
                return name
    return None


def _head(model: Any, last: list[Any]) -> tuple[float, float | None]:
    """Scale and soft-cap of the logits, from a forward pass in which the head's output is a ramp.

    A ramp shows what a few tokens' logits may be too small to show, as soft-capping. `last` is what the decoder's
    hook fills.
    """
    taken: list[Tensor] = []

    def put_ramp(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        taken.append(_first(args))
        size = output.shape[-1]
        return torch.linspace(-50, 50, size, device=output.device).expand_as(output).clone()

    handle = model.get_output_embeddings().register_forward_hook(put_ramp)
    try:
        logits = model(input_ids=probe_ids(model, PROBE_TOKENS, 0)[None], use_cache=False).logits
    finally:
        handle.remove()
    config = model.config.get_text_config(decoder=True)
    numbers = {name: float(value) for name, value in vars(config).items() if _is_number(value)}
    values = sorted(set(numbers.values()))
    ratios = (a / b for a, b in product(values, values))
    scales = list(dict.fromkeys([1.0, *values, *(1 / value for value in values), *ratios]))
    caps = [None, *(value for name, value in numbers.items() if "cap" in name)]
    if len(taken) == len(last) == 1 and isinstance(last[0], Tensor) and last[0].shape == taken[0].shape:
        entered = next((scale for scale in scales if _same(last[0] * scale, taken[0])), None)
        found = logits[0, -1].float()
        ramp = torch.linspace(-50, 50, len(found), device=found.device)
        some = torch.linspace(0, len(found) - 1, 64, device=found.device).long()
        for scale, cap in product(scales, caps):
            scaled = ramp[some] * scale
            if entered and _same(scaled if cap is None else cap * torch.tanh(scaled / cap), found[some]):
                return scale * entered, cap
    raise ValueError(
        f"model {model.config.model_type}: expected logits that are its head's output, scaled by a number of its "
        "configuration and soft-capped, found others; this architecture is not supported"
    )


def _same(found: Tensor, expected: Tensor) -> bool:
    """Whether two tensors are the same up to the rounding of a product."""
    return _near(found, expected, 2e-6 * _largest(expected))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value != 0
