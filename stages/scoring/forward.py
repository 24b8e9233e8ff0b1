"""The forward pass that both stages share: packed rows to log-probabilities, features and divergences.

In: a causal LM, a packed row and the SAEs of some sites. Out, per response: its log-probability (per token in fp32,
summed in float64), and either its pooled features (stage one) or their drift from cached ones (stage two). No other
code measures policy or reference.

Shapes: L positions of a row, T response tokens, R responses, D hidden size, M SAE width.
"""

import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...cache.errors import UserError
from ..model.anatomy import anatomy, causal_lm
from ..model.attention import PACKED, grouped
from ..model.models import Recipe, autocast
from ..model.sae import Site, SiteSAE, capture_sites
from .features import CachedFeatures, FeatureDrift, feature_drift, pooled_features
from .logprobs import token_scores
from .masks import layout_for, masks_for, sequences_of
from .packing import PackedRow, RowLayout
from .rotary import forget_lengths, of_same_frequencies


@dataclass(frozen=True, eq=False)
class LiveReference:
    """What the sequential KL needs of a reference that ran on the same row.

    Attributes:
        hidden_TD: hidden states after the final norm at the prediction positions.
        head_VD: weight of the output head.
        bias_V: its bias; None for none.
    """

    hidden_TD: Tensor
    head_VD: Tensor
    bias_V: Tensor | None


@dataclass(frozen=True, eq=False)
class RowScores:
    """The scores of a row's R responses, from one forward pass.

    Attributes:
        token_logps_T: fp32, nats, in the order of the row's targets.
        logps_R: float64, their sums.
        kl_R: float64, sequential KL(π_ref ‖ π_θ), zeros without a live reference.
        pooled: per site, mean activations, fp32 [R, M]; empty if cached features were given.
        drifts: per site; empty if no cached features were given.
    """

    token_logps_T: Tensor
    logps_R: Tensor
    kl_R: Tensor
    pooled: tuple[Tensor, ...]
    drifts: tuple[FeatureDrift, ...]


def head_weight(model: nn.Module) -> Tensor:
    """Weight of the output head [V, D]."""
    weight: Tensor = causal_lm(model).get_output_embeddings().weight
    return weight


def row_layout(model: nn.Module) -> RowLayout:
    """The row layout that the model's attention needs."""
    return layout_for(causal_lm(model).get_decoder().config)  # of the text model, where the causal LM wraps several


def run_body(model: nn.Module, row: PackedRow, sites: Sequence[Site]) -> tuple[Tensor, dict[Site, Tensor]]:
    """Runs the decoder over a packed row and gathers hidden states and activations at its prediction positions.

    Args:
        model: the causal LM, on the row's device.
        row: the packed row.
        sites: the sites to read.

    Returns:
        Hidden states after the final norm [T, D], and the activations of each site [T, D].

    Raises:
        UserError: under FSDP, sequences of the row need different rotary frequencies.
    """
    inner = causal_lm(model)
    parts = of_same_frequencies(inner.get_decoder(), row, row_layout(model))
    if len(parts) == 1:
        return _run_decoder(inner, row, sites)
    if any(hasattr(weight, "full_tensor") for weight in inner.parameters()):  # all ranks must run as many passes
        raise UserError(
            f"pairs {', '.join(row.names[:3])}: expected one set of rotary frequencies for all sequences, found some "
            "above the length from which this model scales them, which is not supported under FSDP; lower --max-length"
        )
    runs = [_run_decoder(inner, part, sites) for part, _ in parts]
    order_T = torch.cat([targets_T for _, targets_T in parts]).argsort()
    acts = {site: torch.cat([acts[site] for _, acts in runs])[order_T] for site in sites}
    return torch.cat([hidden_TD for hidden_TD, _ in runs])[order_T], acts


def _run_decoder(inner: Any, row: PackedRow, sites: Sequence[Site]) -> tuple[Tensor, dict[Site, Tensor]]:
    """`run_body` for a row whose sequences share one set of rotary frequencies."""
    decoder = inner.get_decoder()
    forget_lengths(decoder)
    config = decoder.config  # of the text model, where the causal LM wraps several
    more: dict[str, Any] = {}
    if config._attn_implementation == PACKED:
        more["sequences"] = grouped(sequences_of(row), row.input_ids_L.device)
    with capture_sites(inner, sites) as captured:
        hidden_LD = decoder(
            input_ids=row.input_ids_L[None],
            position_ids=row.position_ids_L[None],
            attention_mask=masks_for(config, row),
            use_cache=False,
            **more,
        ).last_hidden_state[0]
    # On a GPU the backward of an index sorts first, that of index_select does not.
    return hidden_LD.index_select(0, row.sources_T), {
        site: captured[site][0].index_select(0, row.sources_T) for site in sites
    }


def run_head(
    model: nn.Module, hidden_TD: Tensor, targets_T: Tensor, reference: LiveReference | None = None
) -> tuple[Tensor, Tensor]:
    """`token_scores` of the model's head, run inside the head's own forward, where FSDP has gathered its weight.

    Args:
        model: the causal LM.
        hidden_TD: hidden states after the final norm, at the positions that predict the targets.
        targets_T: int64, the tokens predicted.
        reference: a live reference's state at the same positions.

    Returns:
        `logps_T` and `kl_T`, fp32, nats.
    """
    inner = causal_lm(model)
    found, head = anatomy(inner), inner.get_output_embeddings()
    theirs = None if reference is None else (reference.hidden_TD, reference.head_VD, reference.bias_V)

    def forward(self: nn.Linear, hidden_TD: Tensor) -> tuple[Tensor, Tensor]:
        return token_scores(
            hidden_TD,
            self.weight,
            targets_T,
            bias_V=self.bias,
            scale=found.scale,
            softcap=found.softcap,
            reference=theirs,
        )

    head.forward = types.MethodType(forward, head)
    try:
        return head(hidden_TD)  # type: ignore[no-any-return]
    finally:
        del head.forward


def score_row(
    model: nn.Module,
    row: PackedRow,
    saes: Sequence[SiteSAE],
    recipe: Recipe,
    *,
    cached: Sequence[CachedFeatures] | None = None,
    top_k: int = 0,
    reference: LiveReference | None = None,
) -> RowScores:
    """Scores the responses of one packed row.

    Args:
        model: the causal LM, policy or reference; gradients flow if they are enabled.
        row: the packed row, on the model's device.
        saes: SAEs of the sites to read.
        recipe: the compute recipe; the SAEs run in their own dtype, outside it.
        cached: the reference's features of this row, one entry a site; turns on `drifts` in place of `pooled`.
        top_k: k of D_F, with `cached`.
        reference: a live reference's state on this row; turns on `kl_R`.
    """
    device = row.input_ids_L.device
    with autocast(recipe, device):
        hidden_TD, acts = run_body(model, row, [sae.site for sae in saes])
        token_logps_T, kl_T = run_head(model, hidden_TD, row.targets_T, reference)
    lengths = list(row.lengths)
    pooled: tuple[Tensor, ...] = ()
    drifts: tuple[FeatureDrift, ...] = ()
    with _sae_products(recipe, device):
        if cached is None:
            pooled = tuple(pooled_features(sae.sae, acts[sae.site], lengths) for sae in saes)
        else:
            drifts = tuple(
                feature_drift(sae.sae, acts[sae.site], lengths, features, top_k)
                for sae, features in zip(saes, cached, strict=True)
            )
    return RowScores(
        token_logps_T=token_logps_T,
        logps_R=_sum_responses(token_logps_T, lengths),
        kl_R=_sum_responses(kl_T, lengths),
        pooled=pooled,
        drifts=drifts,
    )


@contextmanager
def _sae_products(recipe: Recipe, device: torch.device) -> Iterator[None]:
    """Allows TF32 in the SAEs' products on a GPU under bf16, which has rounded their activations already.

    The model runs outside: it computes rotary angles by fp32 products.
    """
    if recipe != "bf16" or device.type != "cuda":
        yield
        return
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _sum_responses(values_T: Tensor, lengths: Sequence[int]) -> Tensor:
    return torch.stack([part.sum() for part in values_T.double().split(list(lengths))])


@torch.no_grad()
def live_reference(model: nn.Module, row: PackedRow, recipe: Recipe) -> LiveReference:
    """Runs a frozen reference over a row, for the KL of `score_row`."""
    with autocast(recipe, row.input_ids_L.device):
        hidden_TD, _ = run_body(model, row, [])
    return reference_state(model, hidden_TD)


def reference_state(model: nn.Module, hidden_TD: Tensor) -> LiveReference:
    """The `LiveReference` of hidden states [T, D] at the prediction positions."""
    return LiveReference(hidden_TD, head_weight(model), causal_lm(model).get_output_embeddings().bias)


def attach_scoring(model: nn.Module) -> None:
    """Lets `model(packed=row, …)` run `score_row` inside the model's own forward; other calls are as before.

    Scoring must run inside the forward that DDP or FSDP wraps: outside it, DDP's gradients are silently wrong.
    """

    def forward(self: Any, *args: Any, packed: PackedRow | None = None, **kwargs: Any) -> Any:
        if packed is None:
            return type(self).forward(self, *args, **kwargs)
        return score_row(self, packed, **{name: value for name, value in kwargs.items() if value is not None})

    inner = causal_lm(model)
    inner.forward = types.MethodType(forward, inner)
