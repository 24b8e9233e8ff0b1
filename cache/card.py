"""The data card of a cache, `README.md`, which people and hubs read first.

In: the manifest. Out: the text; equal manifests give equal text.
"""

from collections import Counter
from collections.abc import Sequence

from .identity import Meaning
from .manifest import Manifest

# The hub's size categories begin at these powers of ten.
SIZES = ("1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T")

_CARD = """\
---
pretty_name: Reference cache for feature-level preference optimization
configs:
- config_name: default
  data_files:
  - split: {split}
    path: data/{split}-*.parquet
size_categories:
- {size}
task_categories:
- text-generation
tags:
- preference-optimization
- rlhf
- dpo
- sparse-autoencoder
- fpo
---

# Reference cache for feature-level preference optimization

{pairs} preference pairs: their tokens, and what a frozen reference model said about both responses. Train from it
with `fpo align --cache FOLDER`, or of the hub's copy with `fpo align --cache hf://datasets/OWNER/NAME`, without the
reference model.

Fingerprint: `{fingerprint}`

## Columns

| column | type | meaning |
| --- | --- | --- |
| `pair_id` | string | 16 hex digits of the SHA-256 of the token ids, `-`, row in the raw data |
| `prompt_ids`, `chosen_ids`, `rejected_ids` | list<int32> | token ids |
| `chosen_learnt`, `rejected_learnt` | list<int32> | learnt tokens of the response: first, one past the last, … |
| `chosen_ref_logp`, `rejected_ref_logp` | float64 | log-probability of the response, nats, summed over learnt tokens |
| `chosen_num_tokens`, `rejected_num_tokens` | int32 | learnt tokens |
| `chosen_features_S`, `rejected_features_S` | struct | pooled SAE features at site S |

A struct of features holds `ids` (ascending), `values` (float32, above 0), `floor` (the largest value left out, 0 if
none was) and `nnz` (how many were above 0).

## Sites

| S | site | width | architecture | SHA-256 of the SAE |
| --- | --- | --- | --- | --- |
{sites}
## How it was computed

| | |
| --- | --- |
{settings}
## Counts

| | |
| --- | --- |
{counts}
## Reading

```python
import pyarrow.parquet as pq

table = pq.read_table("data", columns=["pair_id", "chosen_ref_logp", "rejected_ref_logp"])
```

or `datasets.load_dataset(".", split="{split}")`, with the folder or OWNER/NAME in place of the point.

`manifest.json` has the SHA-256 of every shard.
"""


def data_card(manifest: Manifest) -> str:
    """The text of the data card, Markdown under a YAML header."""
    meaning = manifest.meaning
    sites = [(i, f"`{s.site}`", s.width, s.architecture, f"`{s.sae}`") for i, s in enumerate(meaning.sites)]
    counts = Counter({"pairs": manifest.num_pairs, "shards": len(manifest.shards), "bytes": manifest.num_bytes})
    counts.update(manifest.counts)
    counts.update({f"skipped, {reason}": number for reason, number in manifest.skipped.items()})
    return _CARD.format(
        split=meaning.split,
        size=_size_category(manifest.num_pairs),
        pairs=manifest.num_pairs,
        fingerprint=meaning.fingerprint(),
        sites=_table(sites),
        settings=_table(_settings(meaning)),
        counts=_table(sorted(counts.items())),
    )


def _size_category(pairs: int) -> str:
    """The hub's name for a number of rows."""
    reached = sum(pairs >= 10 ** (3 + i) for i in range(len(SIZES)))
    if reached == 0:
        return f"n<{SIZES[0]}"
    if reached == len(SIZES):
        return f"n>{SIZES[-1]}"
    return f"{SIZES[reached - 1]}<n<{SIZES[reached]}"


def _settings(meaning: Meaning) -> list[tuple[str, object]]:
    kept = "all above 0" if meaning.keep_features is None else meaning.keep_features
    return [
        ("reference model, SHA-256", f"`{meaning.model}`"),
        ("tokenizer, SHA-256", f"`{meaning.tokenizer}`"),
        ("data set, SHA-256", f"`{meaning.dataset}`"),
        ("recipe", meaning.recipe),
        ("pooling", meaning.pooling),
        ("features kept", kept),
        ("longest pair, tokens", meaning.max_length),
        ("longest prompt, tokens", meaning.max_prompt_length),
        ("truncation", meaning.truncation),
        ("order", meaning.order),
        ("answers learnt of a response of several", meaning.turns),
        ("date in prompts", "none" if meaning.date is None else meaning.date),
    ]


def _table(rows: Sequence[tuple[object, ...]]) -> str:
    lines = [" | ".join(str(cell).replace("|", r"\|").replace("\n", " ") for cell in row) for row in rows]
    return "".join(f"| {line} |\n" for line in lines)
