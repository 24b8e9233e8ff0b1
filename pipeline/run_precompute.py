"""`fpo precompute`: stage one, from a configuration to a cache.

In: a `RunConfig`. Out: a cache in `--out` and its totals on the terminal. What can be refused is refused before
anything is written.
"""

from ..cache.files import Place
from ..cache.manifest import Manifest
from ..stages.models import choose_attention, load_model
from ..stages.precompute import Reference, precompute
from ..stages.sites import check_fits
from .config import RunConfig, to_yaml
from .inputs import device_of, load_data, load_saes, required
from .progress import PairProgress, console


def run_precompute(config: RunConfig) -> None:
    """`fpo precompute`."""
    _, _, _, out = required(config, "model", "dataset", "sae", "out")
    source, preferences, chat, limits = load_data(config)
    device = device_of(config)
    saes = load_saes(config, device)
    model = load_model(source, attention=choose_attention(config.attention, source, device), device=device)
    for sae in saes:
        check_fits(sae, model)
    with PairProgress(len(preferences)) as progress:
        manifest = precompute(
            Reference(source, model, chat, saes, config.dtype),
            preferences,
            limits,
            out,
            keep_features=None if config.keep_features == "all" else config.keep_features,
            token_budget=config.token_budget,
            shard_size=config.shard_size,
            limit=config.limit,
            options=to_yaml(config),
            on_pairs=progress.advance,
        )
    if manifest is None:
        console.print("shards of this cache are still with other workers; whoever finishes last writes the manifest")
        return
    _print_totals(manifest, out, progress.tokens_per_second)


def _print_totals(manifest: Manifest, out: Place, tokens_per_second: float) -> None:
    counts = manifest.counts
    console.print(
        f"{out}: {manifest.num_pairs} pairs in {len(manifest.shards)} shards, {manifest.num_bytes / 1e6:.1f} MB "
        f"({manifest.num_bytes / max(1, manifest.num_pairs):.0f} bytes a pair), {counts['scored_tokens']} tokens scored"
    )
    if tokens_per_second:
        console.print(f"this run scored {tokens_per_second:.0f} tokens a second")
    console.print(
        f"ties {counts['ties']}, truncated prompts {counts['truncated_prompts']}, "
        f"truncated responses {counts['truncated_responses']}"
    )
    for reason, number in sorted(manifest.skipped.items()):
        console.print(f"skipped {number}: {reason}")
    if manifest.noise:
        mse = ", ".join(f"{value:.2g}" for value in manifest.noise.feature_mse)
        console.print(f"noise between two packings: log-probs {manifest.noise.logp:.2g} nats, D_F {mse}")
