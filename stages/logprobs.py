"""Response log-probabilities, and the sequential KL to a reference, without the logits.

In: hidden states at the prediction positions and the weight of the output head. Out: one number a token. The logits
exist for one chunk of tokens at a time, in forward and again in backward, never for a whole response.

Shapes: T tokens, C tokens of one chunk, D hidden size, V vocabulary.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# Logits that exist at once: 32 MiB in fp32 on a CPU, where more is no faster. On a GPU 512 MiB, 512 tokens of Gemma-2's
# vocabulary: a chunk's product has to take longer than reading the head's weight for it.
CHUNK_ENTRIES = {"cpu": 2**23, "cuda": 2**27}


def chunk_tokens(vocabulary: int, device: torch.device) -> int:
    """How many tokens' logits exist at once for a vocabulary of this size; devices that are no CPU count as GPUs."""
    return max(1, CHUNK_ENTRIES.get(device.type, CHUNK_ENTRIES["cuda"]) // vocabulary)


def _chunks(targets_T: Tensor, vocabulary: int) -> Iterator[slice]:
    size = chunk_tokens(vocabulary, targets_T.device)
    return (slice(start, start + size) for start in range(0, len(targets_T), size))


def _logits(hidden_CD: Tensor, head_VD: Tensor, softcap: float | None) -> Tensor:
    """Logits of one chunk, fp32 [C, V]; the product is taken in the head's dtype."""
    logits_CV = (hidden_CD.to(head_VD.dtype) @ head_VD.T).float()
    return logits_CV if softcap is None else torch.tanh_(logits_CV.div_(softcap)).mul_(softcap)


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
        targets_T: Tensor,
        softcap: float | None,
        reference: tuple[Tensor, Tensor] | None,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        weight_VD, references = head_VD, reference or ()
        ctx.softcap, ctx.dtype = softcap, dtype
        head_VD = head_VD.to(dtype)  # once, not once a chunk
        reference = reference and (reference[0], reference[1].to(dtype))
        logps_T = torch.empty(len(targets_T), dtype=torch.float32, device=hidden_TD.device)
        kl_T = torch.zeros_like(logps_T)
        logp_CV = None
        for part in _chunks(targets_T, head_VD.shape[0]):
            logp_CV = None  # before the next chunk's logits: one exists at a time
            logp_CV = torch.log_softmax(_logits(hidden_TD[part], head_VD, softcap), dim=-1)
            logps_T[part] = logp_CV.gather(1, targets_T[part, None]).squeeze(1)
            if reference is not None:
                ref_logp_CV = torch.log_softmax(_logits(reference[0][part], reference[1], softcap), dim=-1)
                kl_T[part] = (ref_logp_CV.exp() * (ref_logp_CV - logp_CV)).sum(-1)
        # Backward begins with the last chunk and takes its probabilities from here, where it needs no more of it.
        kept_CV = logp_CV if softcap is None and reference is None else None
        ctx.save_for_backward(hidden_TD, weight_VD, targets_T, kept_CV, *references)
        return logps_T, kl_T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_logps_T, grad_kl_T = grads
        hidden_TD, weight_VD, targets_T, kept_CV, *reference = ctx.saved_tensors
        head_VD, *reference_head = (weight.to(ctx.dtype) for weight in (weight_VD, *reference[1:]))
        grad_hidden_TD = torch.empty_like(hidden_TD)
        grad_head_VD = None
        for part in reversed(list(_chunks(targets_T, head_VD.shape[0]))):
            if kept_CV is not None:
                logits_CV, kept_CV = kept_CV, None  # log-probabilities, of which softmax makes the same
            else:
                logits_CV = _logits(hidden_TD[part], head_VD, ctx.softcap)
            probs_CV = torch.softmax(logits_CV, dim=-1)
            # d logp[target] / d logits = 1[target] - p;   d KL(ref ‖ p) / d logits = p - p_ref
            grad_CV = probs_CV * -grad_logps_T[part, None] if reference else probs_CV.mul_(-grad_logps_T[part, None])
            grad_CV.scatter_add_(1, targets_T[part, None], grad_logps_T[part, None])
            if reference:
                ref_logits_CV = _logits(reference[0][part], reference_head[0], ctx.softcap)
                grad_CV.addcmul_(probs_CV.sub_(torch.softmax(ref_logits_CV, dim=-1)), grad_kl_T[part, None])
            if ctx.softcap is not None:
                grad_CV.mul_(1 - (logits_CV / ctx.softcap).square())
            grad_CV = grad_CV.to(ctx.dtype)
            grad_hidden_TD[part] = grad_CV @ head_VD
            if ctx.needs_input_grad[1]:
                grad_head_VD = _add_product(grad_head_VD, grad_CV.T, hidden_TD[part].to(ctx.dtype), weight_VD.dtype)
        return grad_hidden_TD, grad_head_VD, None, None, None, None


def token_scores(
    hidden_TD: Tensor,
    head_VD: Tensor,
    targets_T: Tensor,
    *,
    softcap: float | None = None,
    reference: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target token and, given a reference, the forward KL at its position.

    The matrix product runs in autocast's dtype where autocast is on and in the hidden states' otherwise; softmax,
    soft-capping and both results are fp32. Gradients flow to `hidden_TD` and `head_VD`, none to the reference.

    Args:
        hidden_TD: hidden states after the model's final norm, at the positions that predict the targets.
        head_VD: the output head's weight.
        targets_T: int64, the tokens predicted.
        softcap: Gemma-2's final logit soft-capping, `c·tanh(logits/c)`; None for none.
        reference: the reference's hidden states [T, D'] at the same positions and its head's weight [V, D'].

    Returns:
        `logps_T` fp32 in nats, and `kl_T` fp32 in nats, KL(π_ref ‖ π_θ) (method.md section 2), zeros without a
        reference.
    """
    device = hidden_TD.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_TD.dtype
    with torch.autocast(device, enabled=False):
        logps_T, kl_T = _TokenScores.apply(hidden_TD, head_VD, targets_T, softcap, reference, dtype)  # type: ignore[no-untyped-call]
    return logps_T, kl_T
