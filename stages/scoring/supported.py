"""Whether a model is supported, decided by trying the model itself.

In: a causal LM. Out: nothing, or a UserError that says what would be wrong. Packed rows are compared with plain
transformers on each of their sequences (log-probs, hidden states, activations at every site), and a policy in training
mode with itself under another random seed.

Shapes: T response tokens, L positions of a sequence, D hidden size, V vocabulary.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...cache.errors import UserError
from ...cache.schema import Pair, pair_id
from ..model.anatomy import anatomy, causal_lm, decoder_layers, first_tensor, not_supported, probe_ids, quiet
from ..model.compile import are_compiled, cast_weights, compile_layers
from ..model.models import Recipe
from ..model.sae import Site, capture_sites
from .forward import row_layout, run_body, run_head
from .packing import PackedRow, pack
from .rotary import forget_lengths, frequencies_of, of_same_frequencies, unknown_scaling

# Differences that rounding explains in fp32: nats of a token's log-prob; share of an activation's norm. An architecture
# that is not supported differs by a hundred times as much.
LOGP_TOLERANCE = 1e-3
ACTS_TOLERANCE = 1e-3
# Prompt, chosen and rejected: longer than `WINDOW`, and of one token.
SHORT = ((7, 12, 6), (1, 5, 13))
WINDOW = 4
WINDOWS = re.compile(r"window(_size)?$")  # `sliding_window`, Doge's `keep_window_size`
# Shows effects beyond a distance that no configuration names (GPT-Neo's 256); only the first layers run it.
LONG = (9, 300, 10)
# Rounding may send a router to another expert in one draw of tokens; a fault shows in all.
DRAWS = 3
# An adapter's dropout, which its user has asked for.
ADAPTER_DROPOUT = "lora_dropout"

# The attention under which a model was last found right.
_RIGHT: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


def check_model(model: nn.Module) -> None:
    """Checks that the model scores packed rows as separate sequences, and that scoring reads all of its output head.

    The model is tried as it is, attention and masks included; one that was found right is not tried again.

    Args:
        model: a causal LM, or a PEFT model around one, on its device.

    Raises:
        UserError: the architecture is not supported, or an adapter is on the output head.
    """
    inner = causal_lm(model)
    head = inner.get_output_embeddings()
    read = {id(getattr(head, name, None)) for name in ("weight", "bias")}
    if unread := [name for name, part in head.named_parameters() if id(part) not in read]:
        raise UserError(
            f"expected no adapter on the output head, found one ({unread[0]}), which is not supported; leave the head "
            "out of the adapter's target modules"
        )
    attention = inner.config._attn_implementation
    if _RIGHT.get(inner) == attention:
        return
    try:
        fault = _fault(inner)
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # noqa: BLE001 (whatever a model's own code raises, it does not run packed rows)
        fault = f"an error in its own code ({type(error).__name__}: {' '.join(str(error).split())})"
    if fault:
        raise not_supported(inner, f"packed rows (attention: {attention}) to score as separate sequences", fault)
    _RIGHT[inner] = attention


def load_supported(
    load: Callable[..., Any], attentions: Sequence[str], tell: Callable[[str], None] | None = None
) -> PreTrainedModel:
    """Loads a model under the first attention implementation that is right for it.

    Args:
        load: `load_model` of everything but `attention`.
        attentions: from `attentions_to_try`, the fastest first.
        tell: called with a line if the first is not right.

    Raises:
        UserError: as `load`, or the model is right under none.
    """
    model: PreTrainedModel | None = None
    reasons = []
    for attention in attentions:
        try:
            if model is None:  # also after a failure: a class may lack an attention that its flags promise
                model = load(attention=attention)
            else:
                model.set_attn_implementation(attention)
            check_model(model)
            break
        except ValueError as error:
            if attention == attentions[-1]:
                raise
            reasons.append(f"not {attention}: {error}")
    if reasons and tell:
        tell(f"attention: {attention}; {'; '.join(reasons)}")
    assert model is not None, "there is an attention to try"
    return model


def check_length(model: Any, max_length: int) -> None:
    """Checks that a model with learnt position embeddings (GPT-2, OPT) has one for each position of the longest text.

    Raises:
        UserError: it has fewer.
    """
    config, words = model.config.get_text_config(decoder=True), model.get_input_embeddings()
    longest = getattr(config, "max_position_embeddings", None)
    tables = [
        part.num_embeddings
        for part in model.get_decoder().modules()
        if isinstance(part, nn.Embedding) and part is not words
    ]
    if longest is not None and max_length > longest and any(0 <= rows - longest <= 2 for rows in tables):
        raise UserError(
            f"--max-length: expected at most {longest}, the positions that the model has learnt, found {max_length}; "
            "lower it"
        )


@torch.no_grad()
def _fault(inner: Any) -> str | None:
    """The fault, in a few words; None if the model is right."""
    kinds = set(getattr(inner.get_decoder().config, "layer_types", None) or ())
    if unknown := kinds - {"full_attention", "sliding_attention"}:
        return f"layers of {', '.join(sorted(unknown))}"
    if scaling := unknown_scaling(inner):
        return f"rotary frequencies that depend on length in a way of their own ({scaling})"
    if any(frequencies_of(layer, 1) for layer in decoder_layers(inner)):  # checkpointing would compute them again
        return "rotary frequencies that depend on length inside its layers"
    with quiet(inner):
        found = anatomy(inner)
        sites = [Site(layer, "resid_post") for layer, known in enumerate(found.resid_post) if known]
        sites += [Site(layer, "mlp_out") for layer, part in enumerate(found.mlp_out) if part is not None]
        for attempt in (partial(_try_whole, inner, sites), partial(_try_long, inner)):
            faults = map(attempt, range(DRAWS))
            if (first := next(faults)) and all(faults):
                return first
    return None


def _try_whole(inner: Any, sites: Sequence[Site], seed: int) -> str | None:
    """Runs short pairs in one row through the whole model, with windows that they exceed."""
    with _window(inner, WINDOW):
        row, sequences = _row(inner, SHORT, seed)
        hidden_TD, acts = run_body(inner, row, sites)
        logps_T, _ = run_head(inner, hidden_TD, row.targets_T)
        expected_logps, expected_acts = [], []
        with _plain_attention(inner):
            for ids, predicting in sequences:
                forget_lengths(inner)
                with capture_sites(inner, sites) as captured:
                    logits_LV = inner(input_ids=ids[None], use_cache=False).logits[0, predicting].float()
                expected_logps.append(logits_LV.log_softmax(-1).gather(1, ids[predicting.start + 1 :, None]).squeeze(1))
                expected_acts.append({site: values[0, predicting] for site, values in captured.items()})
    expected_T = torch.cat(expected_logps)
    if not expected_T.isfinite().all():  # scoring names the pair
        return None
    if not (worst := float((logps_T - expected_T).abs().max())) <= LOGP_TOLERANCE:
        return f"log-probs that differ by {worst:.2g} nats"
    faults = (_differs(acts[site], torch.cat([own[site] for own in expected_acts]), site.name) for site in sites)
    return next(filter(None, faults), None)


def _try_long(inner: Any, seed: int) -> str | None:
    """Runs one pair of some hundred tokens through the first layers of each kind, with windows as they are."""
    layers, config = decoder_layers(inner), inner.get_decoder().config
    kinds = list(getattr(config, "layer_types", None) or ())
    depth = min(len(layers), max([2, *(kinds.index(kind) + 1 for kind in set(kinds))]))
    longest = getattr(config, "max_position_embeddings", None) or sum(LONG)
    prompt, *responses = LONG
    row, sequences = _row(inner, [(prompt, *(max(1, min(size, longest - prompt)) for size in responses))], seed)
    parts = of_same_frequencies(inner.get_decoder(), row, row_layout(inner))
    found = [_up_to(layers[depth - 1], partial(run_body, inner, part, []))[part.sources_T] for part, _ in parts]
    found_TD = torch.cat(found)[torch.cat([targets_T for _, targets_T in parts]).argsort()]
    expected = []
    with _plain_attention(inner):
        for ids, predicting in sequences:
            forget_lengths(inner)
            call = partial(inner, input_ids=ids[None], use_cache=False)
            expected.append(_up_to(layers[depth - 1], call)[predicting])
    return _differs(found_TD, torch.cat(expected), f"activations after {depth} layers, {len(sequences[0][0])} tokens")


class _ReachedError(Exception):
    """A forward pass has reached the layer whose output was asked for; the argument is that output."""


def _up_to(layer: nn.Module, call: Callable[[], Any]) -> Tensor:
    """The output [L, D] of a layer; `call` is stopped there."""

    def stop(module: nn.Module, args: Any, output: Any) -> None:
        raise _ReachedError(first_tensor(output))

    with layer.register_forward_hook(stop):
        try:
            call()
        except _ReachedError as reached:
            hidden_1LD: Tensor = reached.args[0]
            return hidden_1LD[0]
    raise ValueError("layers that are not run")


def _differs(found: Tensor, expected: Tensor, what: str) -> str | None:
    """Says by how much of each position's norm `found` differs; None if rounding explains it."""
    if found.shape != expected.shape:
        return f"{what} of shape {list(found.shape)}, expected {list(expected.shape)}"
    if not expected.isfinite().all():
        return None
    found, expected = (values.float().flatten(1) for values in (found, expected))
    worst = float(((found - expected).norm(dim=1) / expected.norm(dim=1).clamp(min=1e-12)).max())
    return None if worst <= ACTS_TOLERANCE else f"{what} that differ by {100 * worst:.2g} % of their norm"


def _row(inner: Any, shapes: Sequence[Sequence[int]], seed: int) -> tuple[PackedRow, list[tuple[Tensor, slice]]]:
    """Random pairs packed into one row, and each of its sequences with the positions that predict its response."""
    pairs, sequences = [], []
    for number, sizes in enumerate(shapes):
        parts = probe_ids(inner, sum(sizes), 10 * seed + number).split(list(sizes))
        prompt, chosen, rejected = (part.cpu().numpy().astype(np.int32) for part in parts)
        pairs.append(Pair(pair_id(prompt, chosen, rejected, number), prompt, chosen, rejected))
        for response in parts[1:]:
            sequences.append((torch.cat([parts[0], response]), slice(sizes[0] - 1, sizes[0] + len(response) - 1)))
    (row,) = pack(pairs, sum(map(sum, shapes)), row_layout(inner))
    return row.to(next(inner.parameters()).device), sequences


@contextmanager
def _window(inner: Any, tokens: int) -> Iterator[None]:
    """Shortens every attention window to `tokens`, so that a short row exceeds it."""
    parts = list(inner.modules())
    held = [
        (place, name, value)
        for place in [*parts, *(part.config for part in parts if hasattr(part, "config"))]
        for name, value in list(vars(place).items())
        if WINDOWS.search(name) and isinstance(value, int) and value > tokens
    ]
    try:
        for place, name, _ in held:
            setattr(place, name, tokens)
        yield
    finally:
        for place, name, value in held:
            setattr(place, name, value)


@contextmanager
def _plain_attention(inner: Any) -> Iterator[None]:
    """Switches to transformers' own eager attention."""
    attention = inner.config._attn_implementation
    inner.set_attn_implementation("eager")
    try:
        yield
    finally:
        inner.set_attn_implementation(attention)


def policy_mode(model: nn.Module, *, checkpointing: bool) -> None:
    """Puts a policy into eval mode, without noise or skipped layers, but for two kinds of modules that must train.

    These are an adapter's dropout, and modules that checkpoint activations, which they do in training mode alone.

    Args:
        model: the policy, perhaps wrapped.
        checkpointing: whether activations will be checkpointed, even if the model is not set so yet.
    """
    model.eval()
    for name, module in model.named_modules():
        saves_memory = getattr(module, "gradient_checkpointing", None)
        if ADAPTER_DROPOUT in name or saves_memory or (checkpointing and saves_memory is not None):
            module.training = True


@torch.no_grad()
def check_repeats(model: nn.Module, score: Callable[[], Tensor], *, checkpointing: bool) -> None:
    """Checks that training computes the same under every random seed, an adapter's dropout apart.

    Args:
        model: the policy, perhaps wrapped; its mode is restored.
        score: runs the policy and returns log-probs, nats.
        checkpointing: as in `policy_mode`.

    Raises:
        UserError: log-probs differ from one seed to another.
    """
    before = model.training
    policy_mode(model, checkpointing=checkpointing)
    for name, module in model.named_modules():
        if ADAPTER_DROPOUT in name:
            module.eval()
    try:
        first, other = _seeded(score, 0), _seeded(score, 1)
        if torch.equal(first, other):
            return
        # GPU kernels that add in any order differ under one seed too.
        found, own = (float((values - first).abs().max()) for values in (other, _seeded(score, 0)))
    finally:
        model.train(before)
    if found > 8 * own:  # False for NaN, which the first step reports with its pair
        raise UserError(
            f"model: expected one that computes the same in training as in evaluation, found log-probs that differ by "
            f"{found:.3g} nats from one seed to another; set what makes it random to 0 in its config.json"
        )


def _seeded(score: Callable[[], Tensor], seed: int) -> Tensor:
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        return score().detach().clone()


def freeze(model: Any, recipe: Recipe, *, compiled: bool, sites: Sequence[Site] = ()) -> None:
    """Checks a model that will not be trained, casts its weights and compiles its layers; a second call does nothing.

    Args:
        model: a causal LM with fp32 weights, on its device.
        recipe: the compute recipe.
        compiled: whether to compile its layers.
        sites: the sites that will be read.

    Raises:
        UserError: the model is not supported.
    """
    model.requires_grad_(False).eval()
    layers = decoder_layers(causal_lm(model))
    if are_compiled(layers) or any(weight.dtype == torch.bfloat16 for weight in layers.parameters()):
        return
    check_model(model)  # while its weights are fp32
    cast_weights(layers, recipe)
    if compiled:
        compile_layers(layers, sites)
