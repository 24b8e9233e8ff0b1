"""Response log-probabilities, and the sequential KL to a reference, without the logits.

In: hidden states at the prediction positions and the output head: its weight, and its bias, scale and soft-capping
where the model has them. Out: one number a token. The logits exist for one chunk of tokens at a time, in forward and
again in backward, never for a whole response.

Shapes: T tokens, C tokens of one chunk, D hidden size, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .fused_head import FusedTokenScores

# Logits that exist at once: 32 MiB in fp32 on a CPU, where more is no faster. On a GPU 512 MiB in bf16, 1,024 tokens of
# Gemma-2's vocabulary: a chunk's products have to take longer than adding to the gradient of the head's weight.
CHUNK_ENTRIES = {"cpu": 2**23, "cuda": 2**28}
# At least so many tokens at a time on a CPU too: for fewer, a product takes longer to read the head's weight than to
# compute, and its gradient longer to be added.
LEAST_TOKENS = 128
# Where the element-wise work is compiled.
FUSED = ("cuda",)


def chunk_tokens(vocabulary: int, device: torch.device) -> int:
    """How many tokens' logits exist at once for a vocabulary of this size; devices that are no CPU count as GPUs."""
    return max(LEAST_TOKENS, CHUNK_ENTRIES.get(device.type, CHUNK_ENTRIES["cuda"]) // vocabulary)


def _chunks(targets_T: Tensor, vocabulary: int) -> Iterator[slice]:
    size = chunk_tokens(vocabulary, targets_T.device)
    return (slice(start, start + size) for start in range(0, len(targets_T), size))


@dataclass(frozen=True)
class _Shape:
    """What stands between the head's product and the logits, apart from the bias."""

    scale: float
    softcap: float | None

    def logits(self, hidden_CD: Tensor, head_VD: Tensor, bias_V: Tensor | None) -> Tensor:
        """Logits of one chunk, fp32 [C, V]; the product is taken in the head's dtype."""
        logits_CV = (hidden_CD.to(head_VD.dtype) @ head_VD.T).float()
        if bias_V is not None:
            logits_CV.add_(bias_V)
        if self.scale != 1:
            logits_CV.mul_(self.scale)
        return logits_CV if self.softcap is None else torch.tanh_(logits_CV.div_(self.softcap)).mul_(self.softcap)

    def backward_(self, grad_CV: Tensor, logits_CV: Tensor) -> Tensor:
        """Turns the gradient of the logits into that of product and bias, in place."""
        if self.softcap is not None:
            grad_CV.mul_(1 - (logits_CV / self.softcap).square())
        return grad_CV if self.scale == 1 else grad_CV.mul_(self.scale)


def _add_product(total: Tensor | None, left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """`total + left @ right` in `dtype`, without a second product of that size where the dtypes are the same."""
    if total is None:
        return (left @ right).to(dtype)
    return total.addmm_(left, right) if left.dtype == dtype else total.add_(left @ right)


class _TokenScores(torch.autograd.Function):
    """log π(target) and KL(π_ref ‖ π) per token, chunk by chunk, with the logits computed again in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        head_VD: Tensor,
        bias_V: Tensor | None,
        targets_T: Tensor,
        shape: _Shape,
        reference: tuple[Tensor, Tensor, Tensor | None] | None,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        weight_VD, references = head_VD, reference or ()
        ctx.shape, ctx.dtype = shape, dtype
        head_VD = head_VD.to(dtype)  # once, not once a chunk
        reference = reference and (reference[0], reference[1].to(dtype), reference[2])
        logps_T = torch.empty(len(targets_T), dtype=torch.float32, device=hidden_TD.device)
        kl_T = torch.zeros_like(logps_T)
        logp_CV = None
        for part in _chunks(targets_T, head_VD.shape[0]):
            logp_CV = None  # before the next chunk's logits: one exists at a time
            logp_CV = torch.log_softmax(shape.logits(hidden_TD[part], head_VD, bias_V), dim=-1)
            logps_T[part] = logp_CV.gather(1, targets_T[part, None]).squeeze(1)
            if reference is not None:
                ref_logp_CV = torch.log_softmax(shape.logits(reference[0][part], *reference[1:]), dim=-1)
                kl_T[part] = (ref_logp_CV.exp() * (ref_logp_CV - logp_CV)).sum(-1)
        # Backward begins with the last chunk and takes its probabilities from here, where it needs no more of it.
        kept_CV = logp_CV if shape.softcap is None and reference is None else None
        ctx.save_for_backward(hidden_TD, weight_VD, bias_V, targets_T, kept_CV, *references)
        return logps_T, kl_T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_logps_T, grad_kl_T = grads
        hidden_TD, weight_VD, bias_V, targets_T, kept_CV, *reference = ctx.saved_tensors
        head_VD, *reference_head = (weight.to(ctx.dtype) for weight in (weight_VD, *reference[1:2]))
        grad_hidden_TD = torch.empty_like(hidden_TD)
        grad_head_VD = None
        grad_bias_V = torch.zeros_like(bias_V, dtype=torch.float32) if ctx.needs_input_grad[2] else None
        for part in reversed(list(_chunks(targets_T, head_VD.shape[0]))):
            if kept_CV is not None:
                logits_CV, kept_CV = kept_CV, None  # log-probabilities, of which softmax makes the same
            else:
                logits_CV = ctx.shape.logits(hidden_TD[part], head_VD, bias_V)
            probs_CV = torch.softmax(logits_CV, dim=-1)
            # d logp[target] / d logits = 1[target] - p;   d KL(ref ‖ p) / d logits = p - p_ref
            grad_CV = probs_CV * -grad_logps_T[part, None] if reference else probs_CV.mul_(-grad_logps_T[part, None])
            grad_CV.scatter_add_(1, targets_T[part, None], grad_logps_T[part, None])
            if reference:
                ref_logits_CV = ctx.shape.logits(reference[0][part], reference_head[0], reference[2])
                grad_CV.addcmul_(probs_CV.sub_(torch.softmax(ref_logits_CV, dim=-1)), grad_kl_T[part, None])
            grad_CV = ctx.shape.backward_(grad_CV, logits_CV)
            if grad_bias_V is not None:
                grad_bias_V += grad_CV.sum(0)
            grad_CV = grad_CV.to(ctx.dtype)
            grad_hidden_TD[part] = grad_CV @ head_VD
            if ctx.needs_input_grad[1]:
                grad_head_VD = _add_product(grad_head_VD, grad_CV.T, hidden_TD[part].to(ctx.dtype), weight_VD.dtype)
        grad_bias_V = grad_bias_V if grad_bias_V is None else grad_bias_V.to(bias_V.dtype)
        return grad_hidden_TD, grad_head_VD, grad_bias_V, None, None, None, None


def token_scores(
    hidden_TD: Tensor,
    head_VD: Tensor,
    targets_T: Tensor,
    *,
    bias_V: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    reference: tuple[Tensor, Tensor] | None = None,
    reference_bias_V: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target token and, given a reference, the forward KL at its position.

    Logits are `scale · (hidden head^T + bias)`, then soft-capped. The matrix product runs in autocast's dtype where
    autocast is on and in the hidden states' otherwise; the rest and both results are fp32. Gradients flow to
    `hidden_TD`, `head_VD` and `bias_V`, none to the reference.

    Args:
        hidden_TD: hidden states after the model's final norm, at the positions that predict the targets.
        head_VD: the output head's weight.
        targets_T: int64, the tokens predicted.
        bias_V: the output head's bias; None for none.
        scale: factor of the logits before soft-capping; the reference's too, as soft-capping is.
        softcap: Gemma-2's final logit soft-capping, `c·tanh(logits/c)`; None for none.
        reference: the reference's hidden states [T, D'] at the same positions and its head's weight [V, D'].
        reference_bias_V: the bias of the reference's head; None for none.

    Returns:
        `logps_T` fp32 in nats, and `kl_T` fp32 in nats, KL(π_ref ‖ π_θ) (method.md section 2), zeros without a
        reference.
    """
    device = hidden_TD.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_TD.dtype
    with torch.autocast(device, enabled=False):
        if device in FUSED:
            chunk = chunk_tokens(head_VD.shape[0], hidden_TD.device)
            theirs = reference and (*reference, reference_bias_V)
            fused: tuple[Tensor, Tensor] = FusedTokenScores.apply(  # type: ignore[no-untyped-call]
                hidden_TD, head_VD, bias_V, targets_T, (scale, softcap), theirs, dtype, chunk
            )
            return fused
        scores: tuple[Tensor, Tensor] = _TokenScores.apply(  # type: ignore[no-untyped-call]
            hidden_TD,
            head_VD,
            bias_V,
            targets_T,
            _Shape(scale, softcap),
            reference and (*reference, reference_bias_V),
            dtype,
        )
    return scores
