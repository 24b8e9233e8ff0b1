"""How far two measurements of the same pairs are apart.

In: two lists of measured pairs. Out: the largest difference of log-probabilities and of features. Stage one measures a
sample twice, with two packings, and stores the difference as the cache's noise; stage two measures a sample with the
policy and compares it with the cache, within a tolerance that stands on that noise.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from torch import nn

from ..cache.manifest import Noise
from ..cache.reader import Cache
from ..cache.schema import CachedPair, SparseFeatures
from .models import Recipe
from .scoring import measure_pairs
from .sites import SiteSAE

# k of the D_F in which feature differences are stated; a run's own --top-k may be another.
TOP_K = 50

# A sample's noise is that of a few pairs and of one machine; another sample, another packing or another device may
# reach several times as much. A policy that is another model is orders of magnitude beyond.
NOISE_FACTOR = 8.0

# Below these a difference is no evidence of another model: rounding of a sum of some hundred token log-probs (nats),
# and a feature that crosses its JumpReLU threshold at one position (D_F).
FLOOR: dict[Recipe, Noise] = {
    "fp32": Noise(logp=1e-3, feature_mse=(1e-6,)),
    "bf16": Noise(logp=1.0, feature_mse=(1e-4,)),
}


def feature_mse(first: SparseFeatures, second: SparseFeatures, top_k: int = TOP_K) -> float:
    """D_F between two cached sets of features of one response (method.md section 2); a feature not kept counts as 0."""
    values = [dict(zip(side.ids.tolist(), side.values.astype(np.float64), strict=True)) for side in (first, second)]
    union = set().union(*(sorted(side, key=lambda i: (-side[i], i))[:top_k] for side in values))
    return float(sum((values[0].get(i, 0.0) - values[1].get(i, 0.0)) ** 2 for i in union)) / top_k


def difference(first: Sequence[CachedPair], second: Sequence[CachedPair]) -> Noise:
    """The largest differences between two measurements of the same pairs.

    Args:
        first: one measurement.
        second: another, of the same pairs in the same order and at the same sites.

    Returns:
        `logp` in nats per response; `feature_mse` per site.
    """
    responses = [
        (ours, theirs)
        for a, b in zip(first, second, strict=True)
        for ours, theirs in ((a.chosen, b.chosen), (a.rejected, b.rejected))
    ]
    sites = range(len(responses[0][0].features))
    return Noise(
        logp=max(abs(ours.logp - theirs.logp) for ours, theirs in responses),
        feature_mse=tuple(
            max(feature_mse(ours.features[site], theirs.features[site]) for ours, theirs in responses) for site in sites
        ),
    )


def tolerance(noise: Noise, recipe: Recipe) -> Noise:
    """The largest difference that is still taken for noise."""
    floor = FLOOR[recipe]
    return Noise(
        logp=max(floor.logp, NOISE_FACTOR * noise.logp),
        feature_mse=tuple(max(floor.feature_mse[0], NOISE_FACTOR * value) for value in noise.feature_mse),
    )


def check_cache(cache: Cache, saes: Sequence[SiteSAE], recipe: Recipe, top_k: int) -> None:
    """Checks that a cache is one that a run can read.

    Args:
        cache: opened with the sites of `saes`.
        saes: the SAEs of the constraint, in the order of the cache's sites; empty for methods without one.
        recipe: the compute recipe of the run.
        top_k: k of D_F.

    Raises:
        ValueError: if the recipe, a site or an SAE is another, or the cache keeps fewer than `top_k` features.
    """
    meaning = cache.manifest.meaning
    if meaning.recipe != recipe:
        raise ValueError(
            f"--dtype: cache {cache.folder} was made with {meaning.recipe}, found {recipe}; policy and reference must "
            "be measured under one recipe"
        )
    sites = [sae.site.name for sae in saes]
    if sites and sites != list(cache.sites):
        raise ValueError(f"cache {cache.folder}: expected sites {', '.join(sites)}, found {', '.join(cache.sites)}")
    hashes = {site.site: site.sae for site in meaning.sites}
    for sae in saes:
        if sae.sha256 != hashes[sae.site.name]:
            raise ValueError(
                f"--sae: the cache's features at {sae.site.name} are of another SAE than {sae.spec} (hashes "
                f"{hashes[sae.site.name][:12]} and {sae.sha256[:12]}); give the one it was made with"
            )
    if saes and meaning.keep_features is not None and top_k > meaning.keep_features:
        raise ValueError(
            f"--top-k: the cache keeps {meaning.keep_features} features a response, found {top_k}; choose fewer"
        )


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
    """Scores a sample of the cache with the policy and compares.

    Args:
        model: the policy before its first step.
        cache: the cache, opened with the sites of `saes`.
        saes: the SAEs of the sites that training reads.
        recipe: the compute recipe.
        pairs: how many pairs, spread evenly over the cache.
        token_budget: tokens of a packed row.
        allow_different_start: report a difference, do not refuse it.

    Returns:
        The largest differences, `parity/logps` in nats and with SAEs `parity/mse` (D_F), and their tolerances.

    Raises:
        ValueError: if a difference is larger than the cache's noise explains, unless that is allowed.
    """
    count = min(pairs, len(cache))
    sample = [cache[round(i * (len(cache) - 1) / max(1, count - 1))] for i in range(count)]
    measured = measure_pairs(
        model,
        [row.pair for row in sample],
        saes,
        recipe,
        token_budget=token_budget,
        keep_features=cache.manifest.meaning.keep_features,
    )
    found = difference(measured, sample)
    noise = cache.manifest.noise
    assert noise is not None, "a cache that holds pairs holds their noise"
    numbers = [[site.site for site in cache.manifest.meaning.sites].index(name) for name in cache.sites]
    allowed = tolerance(dataclasses.replace(noise, feature_mse=tuple(noise.feature_mse[i] for i in numbers)), recipe)
    checks = [("log-probs", "nats", found.logp, allowed.logp)]
    checks += [
        (f"features at {sae.site.name}", "D_F", mse, limit)
        for sae, mse, limit in zip(saes, found.feature_mse, allowed.feature_mse, strict=True)
    ]
    for what, unit, value, limit in checks:
        if not value <= limit and not allow_different_start:
            raise ValueError(
                f"policy and cache differ before the first step: {what} by {value:.3g} {unit} over {count} pairs, "
                f"expected at most {limit:.3g}; margins and constraint would measure against another model: start from "
                "the model that the cache was made with, or pass --allow-different-start"
            )
    report = {"parity/logps": found.logp, "parity/logps_allowed": allowed.logp}
    if saes:
        report |= {"parity/mse": max(found.feature_mse), "parity/mse_allowed": max(allowed.feature_mse)}
    return report
