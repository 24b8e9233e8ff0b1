"""The output head: response log-probabilities and the sequential KL to a reference, in chunks of logits.

In: hidden states at the prediction positions; the output head's weight, bias, scale and soft-capping. Out: a
log-probability and a KL for each token. Logits exist for one chunk of tokens at a time; backward computes them again.
On GPUs the element-wise work is compiled.

Shapes: T tokens, C tokens of one chunk, D hidden size, V vocabulary.
"""

from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..model import flex

# Logits that exist at once. CPU: 32 MiB in fp32; more is no faster. GPU: 512 MiB in bf16 (1,024 tokens of Gemma-2's
# vocabulary), with which a chunk's products take longer than adding to the gradient of the head's weight.
CHUNK_ENTRIES = {"cpu": 2**23, "cuda": 2**28}
# With a chunk of fewer tokens, reading the head's weight and adding to its gradient take longer than the products.
LEAST_TOKENS = 128
# fp32 holds exp(-2 · 40), and its sum over a vocabulary without loss.
LARGEST_BOUND = 40.0
# Device types on which the element-wise work is compiled.
FUSED = ("cuda",)


def chunk_tokens(vocabulary: int, device: torch.device) -> int:
    """How many tokens have logits at once, given the vocabulary's size; every device but a CPU counts as a GPU."""
    return max(LEAST_TOKENS, CHUNK_ENTRIES.get(device.type, CHUNK_ENTRIES["cuda"]) // vocabulary)


def _chunks(targets_T: Tensor, vocabulary: int) -> Iterator[slice]:
    size = chunk_tokens(vocabulary, targets_T.device)
    return (slice(start, start + size) for start in range(0, len(targets_T), size))


def _equal_chunks(targets_T: Tensor, vocabulary: int) -> list[slice]:
    """Chunks of nearly equal size: a compiler would compile a last chunk of one token for itself."""
    tokens = len(targets_T)
    count = -(-tokens // chunk_tokens(vocabulary, targets_T.device))
    bounds = [tokens * number // count for number in range(count + 1)]
    return [slice(start, stop) for start, stop in pairwise(bounds)]


def _logits_of_product(logits_CV: Tensor, bias_V: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    """The model's logits, fp32, from the head's product; out of place, as a compiler needs it."""
    model_CV = logits_CV.float()
    if bias_V is not None:
        model_CV = model_CV + bias_V.float()
    if scale != 1:
        model_CV = model_CV * scale
    if softcap is None:
        return model_CV
    if torch.compiler.is_compiling():
        return flex.soft_capped(model_CV, softcap)
    return softcap * torch.tanh(model_CV / softcap)


def _logits(hidden_CD: Tensor, head_VD: Tensor, bias_V: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    """Logits of one chunk, fp32 [C, V]; the product is taken in the head's dtype."""
    return _logits_of_product(hidden_CD.to(head_VD.dtype) @ head_VD.T, bias_V, scale, softcap)


def _add_product(total: Tensor | None, left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """`total + left @ right` in `dtype`; in place where the dtypes are the same."""
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
        shape: tuple[float, float | None],
        reference: tuple[Tensor, Tensor, Tensor | None] | None,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        weight_VD, references = head_VD, reference or ()
        ctx.shape, ctx.dtype = shape, dtype
        head_VD = head_VD.to(dtype)  # once, not for each chunk
        reference = reference and (reference[0], reference[1].to(dtype), reference[2])
        logps_T = torch.empty(len(targets_T), dtype=torch.float32, device=hidden_TD.device)
        kl_T = torch.zeros_like(logps_T)
        logp_CV = None
        for part in _chunks(targets_T, head_VD.shape[0]):
            logp_CV = None  # before the next chunk's logits: one exists at a time
            logp_CV = torch.log_softmax(_logits(hidden_TD[part], head_VD, bias_V, *shape), dim=-1)
            logps_T[part] = logp_CV.gather(1, targets_T[part, None]).squeeze(1)
            if reference is not None:
                ref_logp_CV = torch.log_softmax(_logits(reference[0][part], *reference[1:], *shape), dim=-1)
                kl_T[part] = (ref_logp_CV.exp() * (ref_logp_CV - logp_CV)).sum(-1)
        # Backward begins with the last chunk; without soft-cap and reference, its log-probs are all that it needs.
        kept_CV = logp_CV if shape[1] is None and reference is None else None
        ctx.save_for_backward(hidden_TD, weight_VD, bias_V, targets_T, kept_CV, *references)
        return logps_T, kl_T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_logps_T, grad_kl_T), (scale, softcap) = grads, ctx.shape
        hidden_TD, weight_VD, bias_V, targets_T, kept_CV, *reference = ctx.saved_tensors
        head_VD, *reference_head = (weight.to(ctx.dtype) for weight in (weight_VD, *reference[1:2]))
        grad_hidden_TD = torch.empty_like(hidden_TD)
        grad_head_VD = None
        grad_bias_V = torch.zeros_like(bias_V, dtype=torch.float32) if ctx.needs_input_grad[2] else None
        for part in reversed(list(_chunks(targets_T, head_VD.shape[0]))):
            if kept_CV is not None:
                logits_CV, kept_CV = kept_CV, None  # log-probs, whose softmax is the same
            else:
                logits_CV = _logits(hidden_TD[part], head_VD, bias_V, scale, softcap)
            probs_CV = torch.softmax(logits_CV, dim=-1)
            # d logp[target] / d logits = 1[target] - p;   d KL(ref ‖ p) / d logits = p - p_ref
            grad_CV = probs_CV * -grad_logps_T[part, None] if reference else probs_CV.mul_(-grad_logps_T[part, None])
            grad_CV.scatter_add_(1, targets_T[part, None], grad_logps_T[part, None])
            if reference:
                ref_logits_CV = _logits(reference[0][part], reference_head[0], reference[2], scale, softcap)
                grad_CV.addcmul_(probs_CV.sub_(torch.softmax(ref_logits_CV, dim=-1)), grad_kl_T[part, None])
            if softcap is not None:
                grad_CV.mul_(1 - (logits_CV / softcap).square())
            if scale != 1:
                grad_CV.mul_(scale)
            if grad_bias_V is not None:
                grad_bias_V += grad_CV.sum(0)
            grad_CV = grad_CV.to(ctx.dtype)
            grad_hidden_TD[part] = grad_CV @ head_VD
            if ctx.needs_input_grad[1]:
                grad_head_VD = _add_product(grad_head_VD, grad_CV.T, hidden_TD[part].to(ctx.dtype), weight_VD.dtype)
        grad_bias_V = grad_bias_V if grad_bias_V is None else grad_bias_V.to(bias_V.dtype)
        return grad_hidden_TD, grad_head_VD, grad_bias_V, None, None, None, None


def _log_sum_exp(model_CV: Tensor, softcap: float | None) -> Tensor:
    """Log-sum-exp; where soft-capping bounds the logits in one pass, since their largest need not be known first."""
    if softcap is None or softcap > LARGEST_BOUND:
        return torch.logsumexp(model_CV, dim=-1)
    return torch.exp(model_CV - softcap).sum(-1).log() + softcap


def _scores(
    logits_CV: Tensor,
    bias_V: Tensor | None,
    targets_C: Tensor,
    ref_logits_CV: Tensor | None,
    ref_bias_V: Tensor | None,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities of the targets, log-sum-exp, KL to the reference and its log-sum-exp; fp32 [C] each."""
    model_CV = _logits_of_product(logits_CV, bias_V, scale, softcap)
    lse_C = _log_sum_exp(model_CV, softcap)
    logps_C = model_CV.gather(1, targets_C[:, None]).squeeze(1) - lse_C
    if ref_logits_CV is None:
        return logps_C, lse_C, torch.zeros_like(lse_C), torch.zeros_like(lse_C)
    ref_CV = _logits_of_product(ref_logits_CV, ref_bias_V, scale, softcap)
    ref_lse_C = _log_sum_exp(ref_CV, softcap)
    ref_logp_CV = ref_CV - ref_lse_C[:, None]
    kl_C = (ref_logp_CV.exp() * (ref_logp_CV - (model_CV - lse_C[:, None]))).sum(-1)
    return logps_C, lse_C, kl_C, ref_lse_C


def _slopes(
    logits_CV: Tensor,
    bias_V: Tensor | None,
    targets_C: Tensor,
    lse_C: Tensor,
    grad_logps_C: Tensor,
    ref_logits_CV: Tensor | None,
    ref_bias_V: Tensor | None,
    ref_lse_C: Tensor,
    grad_kl_C: Tensor,
    scale: float,
    softcap: float | None,
    sum_bias: bool,
) -> tuple[Tensor, Tensor | None]:
    """Gradient of the product, in its dtype [C, V], and its fp32 sum over tokens, where the bias needs it."""
    model_CV = _logits_of_product(logits_CV, bias_V, scale, softcap)
    probs_CV = torch.exp(model_CV - lse_C[:, None])
    ids_V = torch.arange(logits_CV.shape[1], device=logits_CV.device)
    one_hot_CV = (ids_V[None, :] == targets_C[:, None]).float()
    grad_CV = (one_hot_CV - probs_CV) * grad_logps_C[:, None]
    if ref_logits_CV is not None:
        ref_CV = _logits_of_product(ref_logits_CV, ref_bias_V, scale, softcap)
        grad_CV = grad_CV + (probs_CV - torch.exp(ref_CV - ref_lse_C[:, None])) * grad_kl_C[:, None]
    if softcap is not None:
        grad_CV = grad_CV * (1 - (model_CV / softcap).square())
    if scale != 1:
        grad_CV = grad_CV * scale
    return grad_CV.to(logits_CV.dtype), grad_CV.sum(0) if sum_bias else None


@cache
def _compiled(function: Any, backend: str) -> Any:
    return torch.compile(function, backend=backend, fullgraph=True)


def _run(function: Any, *arguments: Any) -> Any:
    for tensor in arguments:
        if isinstance(tensor, Tensor) and tensor.ndim and len(tensor) == len(arguments[0]):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
    return _compiled(function, flex.BACKEND)(*arguments)


@cache
def _adds_in_fp32(device: torch.device) -> bool:
    """Whether torch adds a bf16 product to an fp32 total without rounding the product first."""
    left, total = torch.ones(16, 16, dtype=torch.bfloat16, device=device), torch.ones(16, 16, device=device)
    try:
        torch.addmm(total, left, left, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError, NotImplementedError):
        return False
    return bool((total == 17).all())


def _add_product_fp32(total_VD: Tensor | None, left_VC: Tensor, right_CD: Tensor) -> Tensor:
    """`total + left @ right` in fp32, in place."""
    if total_VD is None:
        total_VD = torch.zeros(left_VC.shape[0], right_CD.shape[1], device=left_VC.device)
    if left_VC.dtype == torch.float32:
        return total_VD.addmm_(left_VC, right_CD)
    if not _adds_in_fp32(left_VC.device):
        return total_VD.add_(left_VC @ right_CD)
    torch.addmm(total_VD, left_VC, right_CD, out_dtype=torch.float32, out=total_VD)
    return total_VD


class _FusedTokenScores(torch.autograd.Function):
    """`_TokenScores` with the element-wise work compiled: on GPUs it would take longer than the products.

    Compiled code reads the product and writes its gradient; all between them is fp32 and stays in registers. The
    gradients of weight and bias are summed in fp32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        head_VD: Tensor,
        bias_V: Tensor | None,
        targets_T: Tensor,
        shape: tuple[float, float | None],
        reference: tuple[Tensor, Tensor, Tensor | None] | None,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        weight_VD = head_VD.to(dtype)
        theirs, ref_weight_VD = reference or (None, None, None), reference and reference[1].to(dtype)
        made = []
        for part in _equal_chunks(targets_T, head_VD.shape[0]):
            logits_CV = hidden_TD[part].to(dtype) @ weight_VD.T
            ref_CV = None if reference is None else reference[0][part].to(dtype) @ ref_weight_VD.T  # type: ignore[union-attr]
            made.append(_run(_scores, logits_CV, bias_V, targets_T[part], ref_CV, theirs[2], *shape))
            del logits_CV, ref_CV
        logps_T, lse_T, kl_T, ref_lse_T = (torch.cat(values) for values in zip(*made, strict=True))
        ctx.save_for_backward(hidden_TD, head_VD, bias_V, targets_T, lse_T, ref_lse_T, *theirs)
        ctx.shape, ctx.dtype = shape, dtype
        return logps_T, kl_T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden_TD, head_VD, bias_V, targets_T, lse_T, ref_lse_T, *theirs = ctx.saved_tensors
        weight_VD, dtype = head_VD.to(ctx.dtype), ctx.dtype
        ref_weight_VD = None if theirs[1] is None else theirs[1].to(dtype)
        grad_logps_T, grad_kl_T = (grad.float() for grad in grads)
        grad_hidden_TD = torch.empty_like(hidden_TD)
        grad_head_VD = grad_bias_V = None
        for part in _equal_chunks(targets_T, head_VD.shape[0]):
            hidden_CD = hidden_TD[part].to(dtype)
            logits_CV = hidden_CD @ weight_VD.T
            ref_CV = None if ref_weight_VD is None else theirs[0][part].to(dtype) @ ref_weight_VD.T
            own = logits_CV, bias_V, targets_T[part], lse_T[part], grad_logps_T[part]
            ref = ref_CV, theirs[2], ref_lse_T[part], grad_kl_T[part]
            grad_CV, sum_V = _run(_slopes, *own, *ref, *ctx.shape, ctx.needs_input_grad[2])
            del own, ref, logits_CV, ref_CV
            grad_hidden_TD[part] = grad_CV @ weight_VD
            if ctx.needs_input_grad[1]:
                grad_head_VD = _add_product_fp32(grad_head_VD, grad_CV.T, hidden_CD)
            if sum_V is not None:
                grad_bias_V = sum_V if grad_bias_V is None else grad_bias_V + sum_V
        made = [
            None if grad is None else grad.to(weight.dtype)
            for grad, weight in ((grad_head_VD, head_VD), (grad_bias_V, bias_V))
        ]
        return grad_hidden_TD, *made, None, None, None, None


def token_scores(
    hidden_TD: Tensor,
    head_VD: Tensor,
    targets_T: Tensor,
    *,
    bias_V: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    reference: tuple[Tensor, Tensor, Tensor | None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target token and, given a reference, the forward KL at its position.

    Logits are `scale · (hidden head^T + bias)`, then soft-capped. The matrix product runs in autocast's dtype under
    autocast, else in the hidden states'; everything else is fp32. Gradients flow to `hidden_TD`, `head_VD` and
    `bias_V`, none to the reference.

    Args:
        hidden_TD: hidden states after the model's final norm, at the positions that predict the targets.
        head_VD: the output head's weight.
        targets_T: int64, the tokens predicted.
        bias_V: the output head's bias; None for none.
        scale: factor of the logits before soft-capping; scale and soft-capping are the reference's too.
        softcap: Gemma-2's final logit soft-capping, `c·tanh(logits/c)`; None for none.
        reference: the reference's hidden states [T, D'] at the same positions, and its head's weight [V, D'] and bias.

    Returns:
        `logps_T` fp32 in nats, and `kl_T` fp32 in nats, KL(π_ref ‖ π_θ) (method.md section 2), zeros without a
        reference.
    """
    device = hidden_TD.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_TD.dtype
    with torch.autocast(device, enabled=False):
        function = _FusedTokenScores if device in FUSED else _TokenScores
        scores: tuple[Tensor, Tensor] = function.apply(  # type: ignore[no-untyped-call]
            hidden_TD, head_VD, bias_V, targets_T, (scale, softcap), reference, dtype
        )
    return scores
