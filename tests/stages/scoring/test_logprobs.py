import logging

import pytest
import torch
from fpo.stages.model import flex
from fpo.stages.scoring import logprobs
from fpo.stages.scoring.logprobs import chunk_tokens, token_scores
from torch import Tensor

TOKENS, HIDDEN, VOCABULARY = 11, 6, 17


pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


@pytest.fixture(autouse=True)
def several_chunks(request, monkeypatch):
    if "fused" in request.fixturenames and request.getfixturevalue("fused"):  # as on a GPU, run by torch's operations
        monkeypatch.setattr(logprobs, "FUSED", ("cpu",))
        monkeypatch.setattr(flex, "BACKEND", "aot_eager")
        logging.getLogger("torch.__trace").handlers.clear()
        torch._dynamo.reset()
    monkeypatch.setitem(logprobs.CHUNK_ENTRIES, "cpu", 3 * VOCABULARY + 1)
    monkeypatch.setattr(logprobs, "LEAST_TOKENS", 1)
    assert chunk_tokens(VOCABULARY, torch.device("cpu")) == 3


@pytest.fixture(params=[False, True], ids=["plain", "fused"])
def fused(request) -> bool:
    return request.param


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def targets() -> Tensor:
    return torch.randint(0, VOCABULARY, (TOKENS,), generator=torch.Generator().manual_seed(0))


def full_log_softmax(
    hidden: Tensor, head: Tensor, softcap: float | None, bias: Tensor | None = None, scale: float = 1.0
) -> Tensor:
    logits = scale * (hidden @ head.T + (0 if bias is None else bias))
    return torch.log_softmax(logits if softcap is None else softcap * torch.tanh(logits / softcap), dim=-1)


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 1e-6) -> None:
    assert (found.detach().double() - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("with_reference", [True, False])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_chunks_give_the_values_and_gradients_of_full_logits(fused, softcap, with_reference, tied):
    body, head = random(HIDDEN, HIDDEN).requires_grad_(), random(VOCABULARY, HIDDEN, seed=1).requires_grad_()
    body_64, head_64 = (tensor.detach().double().requires_grad_() for tensor in (body, head))
    inputs, ids = random(TOKENS, HIDDEN, seed=2), torch.arange(TOKENS)
    # Of another hidden size: a reference need not have the policy's.
    reference = (random(TOKENS, 4, seed=3), random(VOCABULARY, 4, seed=4)) if with_reference else None

    hidden, hidden_64 = (
        torch.tanh((head[ids] if tied else inputs).to(body.dtype) @ body)
        for head, body in ((head, body), (head_64, body_64))
    )
    logps, kl = token_scores(hidden, head, targets(), softcap=softcap, reference=reference)

    log_softmax = full_log_softmax(hidden_64, head_64, softcap)
    expected_logps = log_softmax.gather(1, targets()[:, None]).squeeze(1)
    expected_kl = torch.zeros(TOKENS, dtype=torch.float64)
    if reference is not None:
        ref = full_log_softmax(reference[0].double(), reference[1].double(), softcap)
        expected_kl = torch.nn.functional.kl_div(log_softmax, ref, log_target=True, reduction="none").sum(-1)
    assert logps.dtype == kl.dtype == torch.float32
    assert_close(logps, expected_logps)
    assert_close(kl, expected_kl)

    weights = random(2, TOKENS, seed=5)
    found = torch.autograd.grad((weights[0] * logps + weights[1] * kl).sum(), (body, head))
    expected = torch.autograd.grad((weights[0] * expected_logps + weights[1] * expected_kl).sum(), (body_64, head_64))
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("with_reference", [True, False])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_a_bias_and_a_scale_give_the_values_and_gradients_of_full_logits(fused, softcap, with_reference, scale):
    inputs = [random(TOKENS, HIDDEN), random(VOCABULARY, HIDDEN, seed=1), random(VOCABULARY, seed=2)]
    hidden, head, bias = (tensor.requires_grad_() for tensor in inputs)
    hidden_64, head_64, bias_64 = (tensor.detach().double().requires_grad_() for tensor in inputs)
    reference = (random(TOKENS, HIDDEN, seed=3), random(VOCABULARY, HIDDEN, seed=4)) if with_reference else None
    reference_bias = random(VOCABULARY, seed=6) if with_reference else None
    logps, kl = token_scores(
        hidden,
        head,
        targets(),
        bias_V=bias,
        scale=scale,
        softcap=softcap,
        reference=reference,
        reference_bias_V=reference_bias,
    )

    log_softmax = full_log_softmax(hidden_64, head_64, softcap, bias_64, scale)
    expected_logps = log_softmax.gather(1, targets()[:, None]).squeeze(1)
    expected_kl = torch.zeros(TOKENS, dtype=torch.float64)
    if reference is not None:
        ref = full_log_softmax(reference[0].double(), reference[1].double(), softcap, reference_bias, scale)
        expected_kl = torch.nn.functional.kl_div(log_softmax, ref, log_target=True, reduction="none").sum(-1)
    assert_close(logps, expected_logps)
    assert_close(kl, expected_kl)

    weights = random(2, TOKENS, seed=5)
    found = torch.autograd.grad((weights[0] * logps + weights[1] * kl).sum(), (hidden, head, bias))
    expected = torch.autograd.grad(
        (weights[0] * expected_logps + weights[1] * expected_kl).sum(), (hidden_64, head_64, bias_64)
    )
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs)


def test_the_gradient_of_a_bias_is_summed_in_fp32_under_autocast(fused):
    tokens = 4096
    hidden, head = torch.zeros(tokens, HIDDEN), random(VOCABULARY, HIDDEN)
    bias = random(VOCABULARY, seed=1).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        logps, _ = token_scores(hidden, head, torch.zeros(tokens, dtype=torch.int64), bias_V=bias)
    logps.sum().backward()
    expected = -tokens * torch.softmax(bias.detach().double(), 0)
    expected[0] += tokens
    assert_close(bias.grad, expected, 1e-5)


def test_a_frozen_head_gets_no_gradient_and_the_hidden_states_still_do(fused):
    hidden, head = random(TOKENS, HIDDEN).requires_grad_(), random(VOCABULARY, HIDDEN, seed=1)
    token_scores(hidden, head, targets())[0].sum().backward()
    assert head.grad is None
    expected = hidden.detach().requires_grad_()
    full_log_softmax(expected, head, None)[range(TOKENS), targets()].sum().backward()
    assert_close(hidden.grad, expected.grad.double())


def test_no_gradient_reaches_the_reference():
    hidden, head = random(TOKENS, HIDDEN).requires_grad_(), random(VOCABULARY, HIDDEN, seed=1).requires_grad_()
    reference = (random(TOKENS, HIDDEN, seed=2).requires_grad_(), random(VOCABULARY, HIDDEN, seed=3).requires_grad_())
    token_scores(hidden, head, targets(), reference=reference)[1].sum().backward()
    assert hidden.grad.abs().max() > 0
    assert reference[0].grad is reference[1].grad is None


def test_the_divergence_from_itself_is_0_to_the_bit(fused):
    hidden, head = 5 * random(TOKENS, HIDDEN), random(VOCABULARY, HIDDEN, seed=1)
    assert token_scores(hidden, head, targets(), softcap=3.0, reference=(hidden, head))[1].tolist() == [0.0] * TOKENS


def test_the_result_does_not_depend_on_the_chunks(monkeypatch):
    hidden, head = random(TOKENS, HIDDEN), random(VOCABULARY, HIDDEN, seed=1)
    first, _ = token_scores(hidden, head, targets())
    monkeypatch.setitem(logprobs.CHUNK_ENTRIES, "cpu", 1)  # a vocabulary larger than the chunk: one token at a time
    assert_close(token_scores(hidden, head, targets())[0], first.double())


def test_what_backward_keeps_is_smaller_than_the_logits(fused):
    tokens = 50
    hidden, head = random(tokens, HIDDEN).requires_grad_(), random(VOCABULARY, HIDDEN, seed=1).requires_grad_()
    reference = (random(tokens, HIDDEN, seed=2), random(VOCABULARY, HIDDEN, seed=3))
    kept: list[int] = []

    def count(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        token_scores(hidden, head, torch.zeros(tokens, dtype=torch.int64), softcap=3.0, reference=reference)
    assert kept
    assert max(kept) < tokens * VOCABULARY


def test_bf16_autocast_is_close_and_its_gradients_are_fp32(fused):
    hidden, head = random(TOKENS, HIDDEN).requires_grad_(), random(VOCABULARY, HIDDEN, seed=1).requires_grad_()
    expected = torch.autograd.grad(token_scores(hidden, head, targets())[0].sum(), (hidden, head))
    with torch.autocast("cpu", torch.bfloat16):
        logps, _ = token_scores(hidden, head, targets())
        product = hidden @ head.T
    # Only the product is rounded to bf16; softmax is as exact as ever.
    assert_close(logps, torch.log_softmax(product.double(), -1)[range(TOKENS), targets()].detach())
    found = torch.autograd.grad(logps.sum(), (hidden, head))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == torch.float32
        assert_close(ours, theirs.double(), 0.03)
        assert not torch.equal(ours, theirs)


def test_a_vocabulary_of_any_size_is_taken_so_many_tokens_at_a_time_that_reading_the_head_pays(monkeypatch):
    monkeypatch.undo()
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert [chunk_tokens(size, cpu) for size in (2_000, 49_152, 256_000, 2**30)] == [4194, 170, 128, 128]
    assert chunk_tokens(256_000, gpu) == 1048
