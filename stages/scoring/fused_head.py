"""The element-wise work of the output head, compiled: for GPUs, which it would keep busier than the products do.

In: logits of one chunk of tokens in the product's dtype. Out: their scores, or, with the gradients of the scores, the
gradient of the product, in the product's dtype. The logits are read and the gradient is written; all between is in fp32
and in registers.

Shapes: C tokens of one chunk, D hidden size, V vocabulary.
"""

from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from . import flex


def _bent(logits_CV: Tensor, bias_V: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    """The model's logits, fp32, of the head's product."""
    bent_CV = logits_CV.float()
    if bias_V is not None:
        bent_CV = bent_CV + bias_V.float()
    if scale != 1:
        bent_CV = bent_CV * scale
    return bent_CV if softcap is None else softcap * torch.tanh(bent_CV / softcap)


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
    bent_CV = _bent(logits_CV, bias_V, scale, softcap)
    lse_C = torch.logsumexp(bent_CV, dim=-1)
    logps_C = bent_CV.gather(1, targets_C[:, None]).squeeze(1) - lse_C
    if ref_logits_CV is None:
        return logps_C, lse_C, torch.zeros_like(lse_C), torch.zeros_like(lse_C)
    ref_CV = _bent(ref_logits_CV, ref_bias_V, scale, softcap)
    ref_lse_C = torch.logsumexp(ref_CV, dim=-1)
    ref_logp_CV = ref_CV - ref_lse_C[:, None]
    kl_C = (ref_logp_CV.exp() * (ref_logp_CV - (bent_CV - lse_C[:, None]))).sum(-1)
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
    bent_CV = _bent(logits_CV, bias_V, scale, softcap)
    probs_CV = torch.exp(bent_CV - lse_C[:, None])
    ids_V = torch.arange(logits_CV.shape[1], device=logits_CV.device)
    one_hot_CV = (ids_V[None, :] == targets_C[:, None]).float()
    grad_CV = (one_hot_CV - probs_CV) * grad_logps_C[:, None]
    if ref_logits_CV is not None:
        ref_CV = _bent(ref_logits_CV, ref_bias_V, scale, softcap)
        grad_CV = grad_CV + (probs_CV - torch.exp(ref_CV - ref_lse_C[:, None])) * grad_kl_C[:, None]
    if softcap is not None:
        grad_CV = grad_CV * (1 - (bent_CV / softcap).square())
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
    """Whether torch has products of bf16 that are added to fp32 without being rounded first."""
    left, total = torch.ones(16, 16, dtype=torch.bfloat16, device=device), torch.ones(16, 16, device=device)
    try:
        torch.addmm(total, left, left, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError, NotImplementedError):
        return False
    return bool((total == 17).all())


def add_product(total_VD: Tensor | None, left_VC: Tensor, right_CD: Tensor) -> Tensor:
    """`total + left @ right` in fp32, in place."""
    if total_VD is None:
        total_VD = torch.zeros(left_VC.shape[0], right_CD.shape[1], device=left_VC.device)
    if left_VC.dtype == torch.float32:
        return total_VD.addmm_(left_VC, right_CD)
    if not _adds_in_fp32(left_VC.device):
        return total_VD.add_(left_VC @ right_CD)
    torch.addmm(total_VD, left_VC, right_CD, out_dtype=torch.float32, out=total_VD)
    return total_VD


class FusedTokenScores(torch.autograd.Function):
    """As `_TokenScores` of `logprobs`, with compiled element-wise work."""

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
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        """Scores, chunk by chunk."""
        weight_VD = head_VD.to(dtype)
        theirs, ref_weight_VD = reference or (None, None, None), reference and reference[1].to(dtype)
        made = []
        for part in _parts(len(targets_T), chunk):
            logits_CV = hidden_TD[part].to(dtype) @ weight_VD.T
            ref_CV = None if reference is None else reference[0][part].to(dtype) @ ref_weight_VD.T  # type: ignore[union-attr]
            made.append(_run(_scores, logits_CV, bias_V, targets_T[part], ref_CV, theirs[2], *shape))
            del logits_CV, ref_CV
        logps_T, lse_T, kl_T, ref_lse_T = (torch.cat(values) for values in zip(*made, strict=True))
        ctx.save_for_backward(hidden_TD, head_VD, bias_V, targets_T, lse_T, ref_lse_T, *theirs)
        ctx.shape, ctx.dtype, ctx.chunk = shape, dtype, chunk
        return logps_T, kl_T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of hidden states, weight and bias; those of weight and bias are summed in fp32."""
        hidden_TD, head_VD, bias_V, targets_T, lse_T, ref_lse_T, *theirs = ctx.saved_tensors
        weight_VD, dtype = head_VD.to(ctx.dtype), ctx.dtype
        ref_weight_VD = None if theirs[1] is None else theirs[1].to(dtype)
        grad_logps_T, grad_kl_T = (grad.float() for grad in grads)
        grad_hidden_TD = torch.empty_like(hidden_TD)
        grad_head_VD = grad_bias_V = None
        for part in _parts(len(targets_T), ctx.chunk):
            hidden_CD = hidden_TD[part].to(dtype)
            logits_CV = hidden_CD @ weight_VD.T
            ref_CV = None if ref_weight_VD is None else theirs[0][part].to(dtype) @ ref_weight_VD.T
            own = logits_CV, bias_V, targets_T[part], lse_T[part], grad_logps_T[part]
            ref = ref_CV, theirs[2], ref_lse_T[part], grad_kl_T[part]
            grad_CV, sum_V = _run(_slopes, *own, *ref, *ctx.shape, ctx.needs_input_grad[2])
            del own, ref, logits_CV, ref_CV
            grad_hidden_TD[part] = grad_CV @ weight_VD
            if ctx.needs_input_grad[1]:
                grad_head_VD = add_product(grad_head_VD, grad_CV.T, hidden_CD)
            if sum_V is not None:
                grad_bias_V = sum_V if grad_bias_V is None else grad_bias_V + sum_V
        made = [
            None if grad is None else grad.to(weight.dtype)
            for grad, weight in ((grad_head_VD, head_VD), (grad_bias_V, bias_V))
        ]
        return grad_hidden_TD, *made, None, None, None, None, None


def _parts(tokens: int, chunk: int) -> list[slice]:
    """Chunks that are nearly equal: a compiler takes a chunk of one token for another kind."""
    count = -(-tokens // chunk)
    bounds = [tokens * number // count for number in range(count + 1)]
    return [slice(start, stop) for start, stop in pairwise(bounds)]
