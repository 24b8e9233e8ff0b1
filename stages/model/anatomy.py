"""Where a causal LM's layers are, how its head's output becomes logits, and which parts compute the sites of SAEs.

In: a causal LM. Out: its `Anatomy`, found by one forward pass of a few tokens, not by names of modules and settings:
architectures use many names for the same thing.

Shapes: S tokens of the probe, D hidden size, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import product
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ...cache.errors import UserError

# Relative to the largest entry: far above fp32's rounding, far below the effect of a factor that is missing.
TOLERANCE = 1e-4
PROBE_TOKENS = 8


def causal_lm(model: nn.Module) -> Any:
    """The causal LM inside whatever wraps it (PEFT)."""
    get_base_model: Any = getattr(model, "get_base_model", None)
    return model if get_base_model is None else get_base_model()


@dataclass(frozen=True, eq=False)
class Anatomy:
    """How a model is built.

    Attributes:
        scale: logits are `scale` times the head's output, then soft-capped.
        softcap: `c` of the final soft-capping `c·tanh(logits/c)`; None for none.
        resid_post: per layer, whether its output is the input of the next layer (or of the final norm).
        mlp_out: per layer, the name of the part whose output is the MLP's contribution to the residual stream; None if
            no part computes it.
    """

    scale: float
    softcap: float | None
    resid_post: tuple[bool, ...]
    mlp_out: tuple[str | None, ...]


_KNOWN: WeakKeyDictionary[nn.Module, Anatomy] = WeakKeyDictionary()


def anatomy(model: Any) -> Anatomy:
    """Finds how a model is built, and remembers it as long as the model lives.

    Args:
        model: a causal LM; for a PEFT model, the model inside.

    Raises:
        UserError: there is not exactly one list of decoder layers, or the logits are not the head's output, scaled by
            a number of the configuration and soft-capped.
    """
    if model not in _KNOWN:
        with torch.no_grad(), quiet(model):
            _KNOWN[model] = _examine(model)
    return _KNOWN[model]


def decoder_layers(model: Any) -> nn.ModuleList:
    """The decoder's layers, whatever the architecture calls them (`layers`, `h`, `block`, …).

    Raises:
        UserError: there is not exactly one list of as many modules as the configuration has layers.
    """
    decoder = model.get_decoder()
    if not hasattr(decoder, "config"):
        raise not_supported(model, "a decoder", f"a {type(decoder).__name__}")
    number = getattr(decoder.config.get_text_config(decoder=True), "num_hidden_layers", None)
    lists = [part for part in decoder.modules() if isinstance(part, nn.ModuleList) and len(part) == number]
    lists = [part for part in decoder.children() if part in lists] or lists
    if len(lists) != 1:
        where = type(decoder).__name__
        raise not_supported(model, f"one list of {number} layers in {where}", f"{len(lists)} such lists")
    return lists[0]


def not_supported(model: Any, expected: str, found: str) -> UserError:
    """The error that refuses a model's architecture."""
    return UserError(
        f"model {model.config.model_type}: expected {expected}, found {found}; this architecture is not supported: "
        "give a model of another"
    )


def probe_ids(model: Any, tokens: int, seed: int) -> Tensor:
    """Random token ids [tokens] on the model's device; not the first three, which are usually special tokens."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())  # either may have spare rows
    vocabulary = min(end.weight.shape[0] for end in ends)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(min(3, vocabulary - 1), vocabulary, (tokens,), generator=generator)
    return ids.to(next(model.parameters()).device)


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Puts the model into eval mode, without autocast; at the end restores the mode of every module."""
    training = [part for part in model.modules() if part.training]
    model.eval()
    try:
        with torch.autocast(next(model.parameters()).device.type, enabled=False):
            yield
    finally:
        for part in training:
            part.training = True


def first_tensor(output: Any) -> Any:
    """A module's output; the first entry where it returns several."""
    return output[0] if isinstance(output, tuple | list | dict) and len(output) else output


@dataclass
class _Call:
    """One call of a layer: its input, its output, and the outputs of its parts in the order in which they ran."""

    entered: Any
    left: Any = None
    parts: list[tuple[str, Any]] = field(default_factory=list)


def _examine(model: Any) -> Anatomy:
    layers, decoder = decoder_layers(model), model.get_decoder()
    calls: list[list[_Call]] = [[] for _ in layers]
    outputs: list[Any] = []
    after: list[tuple[Any, Any]] = []  # input and output of the decoder's other parts, the final norm among them

    def note_part(module: nn.Module, args: Any, output: Any) -> None:
        after.append((first_tensor(args), first_tensor(output)))

    with ExitStack() as hooks:
        note = decoder.register_forward_hook(lambda module, args, output: outputs.append(first_tensor(output)))
        hooks.enter_context(note)
        for part in decoder.children():
            if not isinstance(part, nn.ModuleList):
                hooks.enter_context(part.register_forward_hook(note_part))
        for layer, own in zip(layers, calls, strict=True):
            _watch(layer, own, hooks)
        scale, softcap = _head(model, outputs)
    runs = [own[0] if len(own) == 1 else None for own in calls]  # a layer that runs more than once has no sites
    following = [[run.entered] if run else [] for run in runs[1:]]
    following.append([outputs[0], *(taken for taken, made in after if _equal(made, outputs[0]))])
    resid_post = [
        run is not None and getattr(run.left, "ndim", 0) == 3 and any(_equal(taken, run.left) for taken in next_inputs)
        for run, next_inputs in zip(runs, following, strict=True)
    ]
    mlp_out = [None if run is None else _mlp_out(layer, run) for layer, run in zip(layers, runs, strict=True)]
    return Anatomy(scale, softcap, tuple(resid_post), tuple(mlp_out))


def _watch(layer: nn.Module, calls: list[_Call], hooks: ExitStack) -> None:
    """Appends every call of a layer to `calls`.

    A weight that is not finite spoils all values after it, so that any part would look right: such values are replaced
    here. Scoring reports them later, with their pair.
    """

    def enters(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        if args:
            args = (_made_finite(args[0]), *args[1:])
        elif "hidden_states" in kwargs:
            kwargs = kwargs | {"hidden_states": _made_finite(kwargs["hidden_states"])}
        calls.append(_Call(args[0] if args else kwargs.get("hidden_states")))
        return args, kwargs

    def leaves(module: nn.Module, args: Any, output: Any) -> None:
        calls[-1].left = first_tensor(output)

    def part(name: str) -> Any:
        def makes(module: nn.Module, args: Any, output: Any) -> Any:
            output = (_made_finite(output[0]), *output[1:]) if isinstance(output, tuple) else _made_finite(output)
            if calls:
                calls[-1].parts.append((name, first_tensor(output)))
            return output

        return makes

    hooks.enter_context(layer.register_forward_pre_hook(enters, with_kwargs=True))
    hooks.enter_context(layer.register_forward_hook(leaves))
    for name, child in layer.named_children():
        hooks.enter_context(child.register_forward_hook(part(name)))


def _made_finite(values: Any) -> Any:
    """`values`, or random numbers in place of a tensor that is not finite."""
    if not isinstance(values, Tensor) or not values.is_floating_point() or bool(values.isfinite().all()):
        return values
    generator = torch.Generator().manual_seed(0)
    return torch.randn(values.shape, generator=generator).to(values)


def _mlp_out(layer: nn.Module, call: _Call) -> str | None:
    """The part whose output is added last: input + an earlier part's output + its own output = the layer's output."""
    entered, left = call.entered, call.left
    if not isinstance(entered, Tensor) or not isinstance(left, Tensor):
        return None
    parts = [(name, out) for name, out in call.parts if isinstance(out, Tensor) and out.shape == entered.shape]
    rounding = 8 * torch.finfo(entered.dtype).eps * _largest(left)
    for number, (name, added) in enumerate(parts):
        if any("Attention" in type(part).__name__ for part in layer.get_submodule(name).modules()):
            continue
        for _, other in parts[:number]:
            allowed = TOLERANCE * min(_largest(added), _largest(other)) + rounding
            if _near(entered + other + added, left, allowed):
                return name
    return None


def _head(model: Any, outputs: list[Any]) -> tuple[float, float | None]:
    """Scale and soft-cap of the logits, from a forward pass in which a ramp replaces the head's output.

    The logits of a few tokens may be too small to show a soft-cap; the ramp is not. The decoder's hook fills `outputs`.
    """
    taken: list[Tensor] = []

    def put_ramp(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        taken.append(first_tensor(args))
        return torch.linspace(-50, 50, output.shape[-1], device=output.device).expand_as(output).clone()

    with model.get_output_embeddings().register_forward_hook(put_ramp):
        logits = model(input_ids=probe_ids(model, PROBE_TOKENS, 0)[None], use_cache=False).logits
    config = vars(model.config.get_text_config(decoder=True))
    numbers = {name: float(value) for name, value in config.items() if type(value) in (int, float) and value != 0}
    values = sorted(set(numbers.values()))
    ratios = (a / b for a, b in product(values, values))
    scales = list(dict.fromkeys([1.0, *values, *(1 / value for value in values), *ratios]))
    caps = [None, *(value for name, value in numbers.items() if "cap" in name)]
    if len(taken) == len(outputs) == 1 and isinstance(outputs[0], Tensor) and outputs[0].shape == taken[0].shape:
        entered = next((scale for scale in scales if _same(outputs[0] * scale, taken[0])), None)
        found = logits[0, -1].float()
        ramp = torch.linspace(-50, 50, len(found), device=found.device)
        some = torch.linspace(0, len(found) - 1, 64, device=found.device).long()
        for scale, cap in product(scales, caps):
            scaled = ramp[some] * scale
            if entered and _same(scaled if cap is None else cap * torch.tanh(scaled / cap), found[some]):
                return scale * entered, cap
    raise not_supported(
        model, "logits that are its head's output, scaled by a number of its configuration and soft-capped", "others"
    )


def _same(found: Tensor, expected: Tensor) -> bool:
    """Whether two tensors are equal up to the rounding of one product."""
    return _near(found, expected, 2e-6 * _largest(expected))


def _equal(found: Any, expected: Tensor) -> bool:
    return isinstance(found, Tensor) and found.shape == expected.shape and _near(found, expected, 0.0)


def _near(found: Tensor, expected: Tensor, allowed: float) -> bool:
    """Whether every finite difference is at most `allowed`; scoring refuses values that are not finite."""
    off = (found - expected).abs()
    return not bool((off[off.isfinite()] > allowed).any())


def _largest(values: Tensor) -> float:
    return float(torch.where(values.isfinite(), values.abs(), 0.0).max())
