"""Whether the cache reader deals rightly with a folder, whatever is in it.

In: a folder. Out: whether it was accepted; an `AssertionError`, or what the reader should not have raised.
"""

from pathlib import Path

import numpy as np
from fpo.cache.reader import Cache, open_cache, verify
from fpo.cache.schema import CachedPair, pair_id, raw_row_of


def judge(folder: Path) -> bool:
    """Checks that `verify` and `open_cache` agree, raise what they say and nothing else, and accept nothing unsound."""
    damages = verify(folder)
    try:
        cache = open_cache(folder)
    except (ValueError, OSError) as error:
        assert damages, f"open_cache refused what verify called sound: {error}"
        return False
    assert damages == [], f"open_cache accepted what verify called damaged: {damages}"
    _assert_sound(cache)
    return True


def _assert_sound(cache: Cache) -> None:
    """Every row obeys the rules of cache/checks.py, read one by one as training reads them."""
    meaning = cache.manifest.meaning
    rows = [cache[i] for i in range(len(cache))]
    numbers = [raw_row_of(row.pair.pair_id) for row in rows]
    assert numbers == sorted(set(numbers))
    assert len(rows) == cache.manifest.num_pairs
    for row in rows:
        _assert_sound_row(row, meaning.widths)


def _assert_sound_row(row: CachedPair, widths: list[int]) -> None:
    pair = row.pair
    tokens = (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)
    assert pair.pair_id == pair_id(*tokens, raw_row_of(pair.pair_id))
    assert all(len(ids) > 0 and ids.min() >= 0 for ids in tokens)
    spans = (pair.chosen_learnt, pair.rejected_learnt)
    for ids, bounds, answer in zip(tokens[1:], spans, (row.chosen, row.rejected), strict=True):
        learnt = [token for start, stop in zip(bounds[::2], bounds[1::2], strict=True) for token in range(start, stop)]
        assert learnt == sorted(set(learnt)) and learnt[0] >= 0 and learnt[-1] == len(ids) - 1
        assert (bounds[1::2] > bounds[::2]).all()
        assert answer.num_tokens == len(learnt)
        assert np.isfinite(answer.logp) and answer.logp <= 0
        for features, width in zip(answer.features, widths, strict=True):
            found = features.ids.astype(np.int64)
            assert len(found) == len(features.values) <= features.nnz <= width
            assert (np.diff(found) > 0).all() and (found < width).all()
            assert np.isfinite(features.values).all() and (features.values > 0).all()
            assert np.isfinite(features.floor) and features.floor >= 0
            assert (features.values >= features.floor).all()
