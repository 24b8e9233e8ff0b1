"""How far two measurements of the same pairs differ, and how far they may.

In: two lists of measured pairs. Out: their largest differences of log-probs and of features. Stage one measures a
sample in two packings and stores the difference as the cache's noise. Stage two measures a sample with the policy and
compares it with the cache, within a tolerance derived from that noise.

The bound is the largest difference that rounding explains between two packings of a response of T tokens. A larger one
means that a model's values depend on what it is packed with: it stops stage one. Stage two allows no more than the
bound, whatever noise a cache states.

- Log-probs: `LOGP_BOUND` · √T nats. The errors of tokens are almost independent, so that their sum grows as √T.
  Measured for T from 4 to 400: SmolLM2-135M up to 1.1e-5 · √T in fp32 and 0.11 · √T in bf16 (root mean square 0.07),
  random Llamas with extreme logits up to 1.8e-5 · √T and 0.22 · √T. The bound is 60 times that in fp32, where it costs
  nothing, for deeper models; in bf16 it is 4 to 5 times the root mean square.
- D_F: one feature that fires in one packing alone, at every token (`FLIPS_BOUND`; see the floor). Measured: 0.05.

The tolerance of a response, for log-probs as for D_F, is the larger of two numbers, but at most the bound:

- 8 times the noise (`NOISE_FACTOR`). The noise is the largest difference of a few responses; the difference found is
  the largest of 16 others, which may be longer. If differences were normal and the noise came from two pairs, it would
  exceed twice the noise in one start of four and 8 times in one of 400; from four pairs, 8 times in one of 50,000.
- A floor. Most responses round to the same bits in two packings, so that the noise of a few is often 0; and the policy
  may run on another device than the reference.
  Log-probs: 1e-3 nats in fp32, or 2e-6 a token over 500 tokens (what packing may cost, tests/pairs.py); 1 nat in bf16,
  which rounds by up to 2^-9 of a number. There, weights changed by a hundred-thousandth move responses of 11 tokens of
  the embedded world by up to 0.4 nats.
  D_F: a feature near its threshold fires in one measurement and not in the other. At one of T tokens, that moves the
  mean by activation / T, in any dtype. One such flip in every tenth token moves D_F by (D_F to no feature at all) /
  10 T, times at most the feature's share of all that fires. This is the floor.

docs/reliability.md says how far each kind of wrong start differs, and what is too small to be seen.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from torch import nn

from ...cache.errors import UserError
from ...cache.manifest import Noise
from ...cache.reader import Cache
from ...cache.schema import CachedPair, ReferenceResponse, SparseFeatures
from ..model.models import Recipe
from ..model.sae import SiteSAE
from .measure import measure_pairs

# k of the D_F in which feature differences are stated; a run's --top-k may differ.
TOP_K = 50

NOISE_FACTOR = 8.0
LOGP_FLOOR: dict[Recipe, float] = {"fp32": 1e-3, "bf16": 1.0}  # nats
FLIPS = 0.1  # of a token
LOGP_BOUND: dict[Recipe, float] = {"fp32": 1e-3, "bf16": 0.3}  # nats, for one token
FLIPS_BOUND = 1.0

NO_FEATURES = SparseFeatures(np.zeros(0, np.uint16), np.zeros(0, np.float32), floor=0.0, nnz=0)


def feature_mse(first: SparseFeatures, second: SparseFeatures, top_k: int = TOP_K) -> float:
    """D_F between two cached sets of features of one response (method.md section 2); missing features count as 0."""
    values = [dict(zip(side.ids.tolist(), side.values.astype(np.float64), strict=True)) for side in (first, second)]
    union = set().union(*(sorted(side, key=lambda i: (-side[i], i))[:top_k] for side in values))
    return float(sum((values[0].get(i, 0.0) - values[1].get(i, 0.0)) ** 2 for i in union)) / top_k


def apart(first: Sequence[CachedPair], second: Sequence[CachedPair]) -> list[Noise]:
    """Differences between two measurements of the same pairs, in the same order and at the same sites.

    Returns:
        One entry a response, chosen and rejected in turn: `logp` in nats, `feature_mse` by site.
    """
    return [
        Noise(
            logp=abs(ours.logp - theirs.logp),
            feature_mse=tuple(feature_mse(a, b) for a, b in zip(ours.features, theirs.features, strict=True)),
        )
        for ours, theirs in zip(_responses(first), _responses(second), strict=True)
    ]


def difference(first: Sequence[CachedPair], second: Sequence[CachedPair]) -> Noise:
    """The largest difference between two measurements: of log-probs, and of features by site."""
    found = apart(first, second)
    by_site = zip(*(noise.feature_mse for noise in found), strict=True)
    return Noise(max(noise.logp for noise in found), tuple(max(site) for site in by_site))


def _responses(rows: Sequence[CachedPair]) -> list[ReferenceResponse]:
    return [response for row in rows for response in (row.chosen, row.rejected)]


def bound(recipe: Recipe, sample: Sequence[CachedPair]) -> list[Noise]:
    """The largest differences that rounding explains, one entry a response of `sample`, as in `apart`."""
    responses = _responses(sample)
    sizes_SR = _sizes(responses)
    logps = [max(LOGP_FLOOR[recipe], LOGP_BOUND[recipe] * response.num_tokens**0.5) for response in responses]
    flips = [FLIPS_BOUND * np.maximum(sizes_R, np.mean(sizes_R)) for sizes_R in sizes_SR]
    return [
        Noise(logp, tuple(float(size_R[i]) / response.num_tokens for size_R in flips))
        for i, (logp, response) in enumerate(zip(logps, responses, strict=True))
    ]


def tolerance(noise: Noise, recipe: Recipe, sample: Sequence[CachedPair]) -> list[Noise]:
    """The largest differences to a cache that count as noise.

    Args:
        noise: the cache's, at the sample's sites.
        recipe: the compute recipe.
        sample: pairs of the cache.

    Returns:
        One entry a response, as in `apart`.
    """
    responses = _responses(sample)
    sizes = [np.mean(sizes_R) for sizes_R in _sizes(responses)]
    logp = max(LOGP_FLOOR[recipe], NOISE_FACTOR * noise.logp)
    return [
        Noise(
            min(logp, most.logp),
            tuple(
                min(max(float(FLIPS * size) / response.num_tokens, NOISE_FACTOR * value), limit)
                for size, value, limit in zip(sizes, noise.feature_mse, most.feature_mse, strict=True)
            ),
        )
        for response, most in zip(responses, bound(recipe, sample), strict=True)
    ]


def _sizes(responses: Sequence[ReferenceResponse]) -> list[np.ndarray]:
    """D_F of each response to an empty set of features, [R] for each site."""
    sites = zip(*(response.features for response in responses), strict=True)
    return [np.array([feature_mse(features, NO_FEATURES) for features in of_site]) for of_site in sites]


def check_packings(first: Sequence[CachedPair], second: Sequence[CachedPair], recipe: Recipe) -> None:
    """Checks that measurements of the same pairs in two packings differ by no more than rounding explains.

    Raises:
        UserError: they differ by more; names the pairs, with both numbers of the one that is farthest off.
    """
    names = [f"{row.pair.pair_id} {side}" for row in first for side in ("chosen", "rejected")]
    logps = [(one.logp, other.logp) for one, other in zip(_responses(first), _responses(second), strict=True)]
    wrong: dict[str, tuple[float, str]] = {}
    for name, both, found, most in zip(names, logps, apart(first, second), bound(recipe, first), strict=True):
        limits = {"log-probs {:.6g} and {:.6g} nats".format(*both): (found.logp, most.logp)}
        limits |= {
            f"features at site {site} {value:.2g} apart in D_F": (value, limit)
            for site, (value, limit) in enumerate(zip(found.feature_mse, most.feature_mse, strict=True))
        }
        for what, (value, limit) in limits.items():
            if not value <= limit:
                wrong.setdefault(name, (value / (limit or 1.0), f"{what} (at most {limit:.2g} apart in {recipe})"))
    if wrong:
        worst, *others = sorted(wrong, key=lambda name: -wrong[name][0])
        more = f", and {', '.join(others[:3])}{' …' if len(others) > 3 else ''}" if others else ""
        raise UserError(
            f"expected a pair to mean the same in two packings, found {worst}: {wrong[worst][1]}{more}; "
            "this model's results depend on what a pair is packed with: give --attention eager, or another model"
        )


def check_cache(cache: Cache, saes: Sequence[SiteSAE], recipe: Recipe, top_k: int) -> None:
    """Checks that a cache fits a run.

    Args:
        cache: opened with the sites of `saes`.
        saes: the SAEs of the constraint, in the order of the cache's sites; empty for methods without one.
        recipe: the run's compute recipe.
        top_k: k of D_F.

    Raises:
        UserError: recipes, sites or SAEs differ, or the cache keeps fewer than `top_k` features.
    """
    meaning = cache.manifest.meaning
    if meaning.recipe != recipe:
        raise UserError(
            f"--dtype: cache {cache.folder} was made with {meaning.recipe}, found {recipe}; policy and reference must "
            "be measured under one recipe"
        )
    sites = [sae.site.name for sae in saes]
    if sites and sites != list(cache.sites):
        raise UserError(f"cache {cache.folder}: expected sites {', '.join(sites)}, found {', '.join(cache.sites)}")
    hashes = {site.site: site.sae for site in meaning.sites}
    for sae in saes:
        if sae.sha256 != hashes[sae.site.name]:
            raise UserError(
                f"--sae: the cache's features at {sae.site.name} are of another SAE than {sae.spec} (hashes "
                f"{hashes[sae.site.name][:12]} and {sae.sha256[:12]}); give the one it was made with"
            )
    if saes and meaning.keep_features is not None and top_k > meaning.keep_features:
        raise UserError(
            f"--top-k: the cache keeps {meaning.keep_features} features a response, found {top_k}; choose fewer"
        )


def _noise_of(cache: Cache) -> Noise:
    """The cache's noise at the sites for which it was opened."""
    noise = cache.manifest.noise
    assert noise is not None, "a cache that holds pairs holds their noise"
    numbers = [[site.site for site in cache.manifest.meaning.sites].index(name) for name in cache.sites]
    return dataclasses.replace(noise, feature_mse=tuple(noise.feature_mse[i] for i in numbers))


def check_parity(
    model: nn.Module,
    cache: Cache,
    saes: Sequence[SiteSAE],
    recipe: Recipe,
    *,
    pairs: int,
    token_budget: int,
    allow_different_start: bool = False,
) -> dict[str, float]:
    """Measures a sample of the cache with the policy and compares.

    Args:
        model: the policy before its first step.
        cache: the cache, opened with the sites of `saes`.
        saes: the SAEs of the sites that training reads.
        recipe: the compute recipe.
        pairs: how many pairs, spread evenly over the cache.
        token_budget: tokens of a packed row.
        allow_different_start: report a difference instead of refusing it.

    Returns:
        The largest differences, `parity/logps` in nats and with SAEs `parity/mse` (D_F), and their tolerances.

    Raises:
        UserError: a difference exceeds its tolerance and is not allowed.
        FloatingPointError: the policy's log-probs or features are not finite.
    """
    count = min(pairs, len(cache))
    sample = [cache[round(i * (len(cache) - 1) / max(1, count - 1))] for i in range(count)]
    try:
        measured = measure_pairs(
            model,
            [row.pair for row in sample],
            saes,
            recipe,
            token_budget=token_budget,
            keep_features=cache.manifest.meaning.keep_features,
        )
    except FloatingPointError as error:
        raise FloatingPointError(
            f"before the first step: {error}; start from a model whose weights are whole"
        ) from error
    found, allowed = apart(measured, sample), tolerance(_noise_of(cache), recipe, sample)
    checks = [("log-probs", "nats", *_farthest([n.logp for n in found], [n.logp for n in allowed]))]
    for site, sae in enumerate(saes):
        mse = _farthest([n.feature_mse[site] for n in found], [n.feature_mse[site] for n in allowed])
        checks.append((f"features at {sae.site.name}", "D_F", *mse))
    report: dict[str, float] = {}
    for what, unit, value, limit in checks:
        if not value <= limit and not allow_different_start:
            raise UserError(
                f"policy and cache differ before the first step: {what} by {value:.3g} {unit} over {count} pairs, "
                f"expected at most {limit:.3g}; margins and constraint would measure against another model: start from "
                "the model that the cache was made with, or pass --allow-different-start"
            )
        name = "parity/logps" if unit == "nats" else "parity/mse"
        if value >= report.get(name, 0.0):
            report |= {name: value, f"{name}_allowed": limit}
    return report


def _farthest(values: Sequence[float], limits: Sequence[float]) -> tuple[float, float]:
    """The difference that is farthest beyond its tolerance, or nearest to it, and that tolerance."""
    return max(zip(values, limits, strict=True), key=lambda pair: pair[0] - pair[1])
