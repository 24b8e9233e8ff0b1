"""Random preference pairs, models to score them, and what a model says about each response alone.

The last part is the independent implementation that packed scoring is held against: one unpadded sequence a response
through plain transformers, full logits, every SAE feature.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from fpo.cache.schema import Pair, pair_id
from fpo.stages.model.sae import Site, SiteSAE
from hypothesis import settings
from hypothesis import strategies as st
from tiny import tiny_gemma2, tiny_llama
from torch import Tensor

# Threads cost these models more than they give.
torch.set_num_threads(1)

# No deadline: on a shared machine it measures the neighbours.
many_examples = settings(deadline=None)
# For models. The same examples on every run: a rounding that flips a JumpReLU must not fail one run in a thousand.
few_examples = settings(max_examples=15, deadline=None, derandomize=True)


def random_pair(prompt: int, chosen: int, rejected: int, seed: int = 0, raw_row: int = 0) -> Pair:
    """A pair of these lengths, of the tiny models' tokens."""
    rng = np.random.default_rng([seed, raw_row])
    ids = [rng.integers(0, 128, length).astype(np.int32) for length in (prompt, chosen, rejected)]
    return Pair(pair_id(*ids, raw_row), *ids)


def with_context(pair: Pair, seed: int) -> Pair:
    """The pair as one of several turns: random tokens of its responses are context, the last one is learnt."""
    rng = np.random.default_rng(seed)
    spans = []
    for response in (pair.chosen_ids, pair.rejected_ids):
        learnt = rng.random(response.size) < 0.5
        learnt[-1] = True
        spans.append(np.diff(learnt.astype(np.int8), prepend=0, append=0).nonzero()[0].astype(np.int32))
    return replace(pair, chosen_learnt=spans[0], rejected_learnt=spans[1])


def swapped(pair: Pair) -> Pair:
    """Chosen and rejected exchanged."""
    chosen, rejected = (pair.chosen_ids, pair.chosen_learnt), (pair.rejected_ids, pair.rejected_learnt)
    return Pair(pair.pair_id, pair.prompt_ids, rejected[0], chosen[0], rejected[1], chosen[1])


def learnt_tokens(pair: Pair) -> list[list[int]]:
    """Which tokens of chosen and rejected are learnt."""
    sides = (pair.chosen_learnt, pair.rejected_learnt)
    return [[token for start, stop in spans.reshape(-1, 2) for token in range(start, stop)] for spans in sides]


def random_pairs(seed: int, count: int, longest: int = 24) -> list[Pair]:
    """Pairs of random lengths; most are longer than the tiny models' sliding window of 8."""
    lengths = np.random.default_rng(seed).integers(1, longest + 1, (count, 3))
    return [random_pair(*row, seed, number) for number, row in enumerate(lengths.tolist())]


def pair_lists(most: int = 4, longest: int = 24) -> st.SearchStrategy[list[Pair]]:
    """Lists of pairs of any lengths, from one token a part."""
    length = st.integers(1, longest)
    return st.lists(st.builds(random_pair, length, length, length, st.integers(0, 99)), min_size=1, max_size=most)


def calm_gemma2(seed: int = 0, **overrides: Any) -> Any:
    """`tiny_gemma2` with logits of ordinary size, so that fp32 rounds below the promised 2e-6 a token.

    The soft-caps are lower in proportion: both still bend what they cap.
    """
    return _calm(tiny_gemma2(seed, **{"attn_logit_softcapping": 0.5, "final_logit_softcapping": 1.0} | overrides), -0.5)


def calm_llama(seed: int = 0, **overrides: Any) -> Any:
    """`tiny_llama`, likewise."""
    return _calm(tiny_llama(seed, **overrides), 0.1)


def _calm(model: Any, final_norm: float) -> Any:
    for name, weight in model.named_parameters():
        if "q_proj" in name or "k_proj" in name:
            weight.data /= 6
    model.model.norm.weight.data += final_norm - model.model.norm.weight.data.mean()
    return model


@dataclass(frozen=True, eq=False)
class Alone:
    """A response scored in a sequence of its own.

    Attributes:
        logps_TV: fp32, log-probabilities of every token at the prediction positions.
        targets_T: int64, the response.
        acts: per site, activations at the prediction positions [T, D].
    """

    logps_TV: Tensor
    targets_T: Tensor
    acts: dict[Site, Tensor]

    @property
    def token_logps_T(self) -> Tensor:
        return self.logps_TV[range(len(self.targets_T)), self.targets_T]

    def pooled_M(self, sae: SiteSAE) -> Tensor:
        return sae.sae.encode(self.acts[sae.site]).mean(0)


def score_alone(model: Any, pair: Pair, sites: Sequence[Site] = ()) -> tuple[Alone, Alone]:
    """Chosen and rejected of one pair."""
    return _alone(model, pair.prompt_ids, pair.chosen_ids, sites), _alone(
        model, pair.prompt_ids, pair.rejected_ids, sites
    )


def _alone(model: Any, prompt: np.ndarray, response: np.ndarray, sites: Sequence[Site]) -> Alone:
    layers, found, handles = model.model.layers, {}, []
    for site in sites:

        def keep(module: Any, args: Any, output: Any = None, site: Site = site) -> None:
            found[site] = args[0] if output is None else output

        if site.kind == "mlp_out":
            layer = layers[site.layer]
            handles.append(getattr(layer, "post_feedforward_layernorm", layer.mlp).register_forward_hook(keep))
        else:  # what a block puts out is what the next one, or the final norm, takes in
            after = model.model.norm if site.layer == len(layers) - 1 else layers[site.layer + 1].input_layernorm
            handles.append(after.register_forward_pre_hook(keep))
    sequence = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))
    logits_LV = model(input_ids=sequence[None], use_cache=False).logits[0]
    for handle in handles:
        handle.remove()
    predicting = slice(len(prompt) - 1, -1)
    return Alone(
        torch.log_softmax(logits_LV[predicting], dim=-1),
        sequence[len(prompt) :],
        {site: acts[0, predicting] for site, acts in found.items()},
    )


def dense_drift(own_M: Tensor, reference_M: Tensor, top_k: int) -> Tensor:
    """D_F of method.md section 2 from all features of both sides, float64."""
    union: set[int] = set()
    for side_M in (own_M.tolist(), reference_M.tolist()):
        ranked = sorted(range(len(side_M)), key=lambda i, side=side_M: (-side[i], i))
        union.update(i for i in ranked[:top_k] if side_M[i] > 0)
    ids = sorted(union)
    return (own_M[ids].double() - reference_M[ids].double()).square().sum() / top_k


def gradients(model: torch.nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Gradient of the loss with respect to every weight that it depends on."""
    model.zero_grad()
    loss.backward()
    found = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    return found


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """Equal to `tolerance` of each tensor's largest entry, or to 1e-6 of the largest entry of all.

    A query that sees one key has no gradient but the rounding of what cancels: up to 1.5e-7 of the others' here.
    """
    assert found.keys() == expected.keys()
    rounding = 1e-6 * max(float(grad.abs().max()) for grad in expected.values())
    for name, grad in expected.items():
        allowed = max(tolerance * float(grad.abs().max()), rounding)
        assert float((found[name] - grad).abs().max()) <= allowed, name
