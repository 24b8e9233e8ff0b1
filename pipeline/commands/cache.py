"""`fpo cache info`: what is in a cache, as a person wants to read it.

In: a cache's folder or URL. Out: a line for each fact, on the terminal.
"""

from pathlib import Path
from typing import Any

import typer

from ...cache.manifest import Manifest
from ...cache.reader import open_cache
from ...cache.shard import read_columns


def print_info(place: Path | str) -> None:
    """Prints pairs, sites, sizes, what was skipped, noise and provenance.

    Raises:
        UserError: there is no finished cache, or it is damaged.
    """
    cache = open_cache(place, sites=[])
    manifest = cache.manifest
    meaning, numerics = manifest.meaning, manifest.numerics

    def line(name: str, value: object) -> None:
        typer.echo(f"{name:<14} {value}")

    pairs, counts = max(1, manifest.num_pairs), manifest.counts
    line("pairs", f"{manifest.num_pairs} in {len(manifest.shards)} shards of {numerics.shard_size} raw rows")
    line("size", f"{manifest.num_bytes / 1e6:.1f} MB, {manifest.num_bytes / pairs:.0f} bytes a pair")
    line("split", f"{meaning.split}, limit {meaning.limit or 'none'}")
    line("skipped", ", ".join(f"{reason} {n}" for reason, n in sorted(manifest.skipped.items())) or "none")
    line("ties", f"{counts['ties']} ({'dropped' if meaning.drop_ties else 'kept'})")
    line("truncated", f"{counts['truncated_prompts']} prompts, {counts['truncated_responses']} responses")
    if meaning.date is not None:
        line("date", f"{meaning.date} to the chat template, which reads the clock")
    line("lengths", f"prompt up to {meaning.max_prompt_length}, with response up to {meaning.max_length} tokens")
    kept = "all" if meaning.keep_features is None else meaning.keep_features
    line("features kept", f"{kept} a response and site")
    records = cache.provenance()
    fits = records[-1].get("sae_fits") if records else None
    for number, site in enumerate(meaning.sites):
        line(f"site {number}", f"{site.site}: {site.architecture} SAE, width {site.width}, {site.sae[:12]}")
        line("", _feature_statistics(cache.folder, manifest, number))
        if fits:
            line("", _fit(fits[number]))
    if manifest.noise:
        mse = ", ".join(f"{value:.2g}" for value in manifest.noise.feature_mse)
        line("noise", f"between two packings: log-probs {manifest.noise.logp:.2g} nats, D_F {mse}")
    line("recipe", f"{meaning.recipe}, {numerics.attention} attention, {numerics.token_budget} tokens a row")
    line("device", f"{numerics.device}, {numerics.threads} threads")
    line("versions", ", ".join(f"{name} {version}" for name, version in numerics.versions.items()))
    line("model", meaning.model[:12])
    line("fingerprint", meaning.fingerprint())
    for record in records:
        rate = record["scored_tokens"] / record["seconds"] if record["seconds"] else 0.0
        line(
            "provenance",
            f"{record['finished']} {record['host']}: {record['model']} over {record['dataset']}, {record['shards']} "
            f"shards, {record['scored_tokens']} tokens in {record['seconds']} s ({rate:.0f} tokens/s)",
        )


def _fit(fit: dict[str, Any]) -> str:
    """How the SAE did on the first pairs."""
    explained = fit["explained_variance"]
    return f"L0 {fit['l0']:.1f}, explained variance {'unknown' if explained is None else f'{explained:.3f}'} at first"


def _feature_statistics(folder: Path, manifest: Manifest, site: int) -> str:
    """How much of the pooled activations the cache holds; what it left out is where training's lookups can miss."""
    above_zero = kept = cut = responses = 0
    for record in manifest.shards:
        columns = [f"{side}_features_{site}" for side in ("chosen", "rejected")]
        shard = read_columns(folder / record.name, manifest.meaning, columns)
        for name in columns:
            for struct in shard[name].chunks:
                counts = struct.field("nnz").to_numpy()
                responses += len(counts)
                above_zero += int(counts.sum())
                kept += int(struct.field("ids").value_lengths().to_numpy().sum())
                cut += int((struct.field("floor").to_numpy() > 0).sum())
    return (
        f"{above_zero / max(1, responses):.0f} features above 0 a response, {kept / max(1, above_zero):.1%} of them "
        f"kept; {cut} of {responses} responses were cut"
    )
