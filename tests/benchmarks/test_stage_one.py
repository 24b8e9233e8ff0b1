import pytest

from benchmarks.prepare import cached_pairs
from benchmarks.stage_one import TITLES, WAYS, rows, score


@pytest.mark.filterwarnings("ignore")  # TRL's own
def test_all_ways_measure_the_same_log_probabilities(prepared):
    setting, folder = prepared
    pairs = cached_pairs(folder)
    runs = {name: make(setting, folder) for name, make in WAYS.items()}
    for part in (pairs[:2], pairs[2:]):
        expected = runs["fpo"](part)
        assert runs["trl"](part) == pytest.approx(expected, abs=1e-3)
        assert runs["plain"](part) == pytest.approx(expected, abs=1e-3)


def test_a_way_is_timed_on_the_measured_pairs(prepared):
    setting, folder = prepared
    result = score(setting, folder, "fpo")
    assert result["seconds_a_pair"] == result["seconds"] / 4
    assert [row["time, ratio"] for row in rows({"fpo": result, "plain": result}, TITLES)] == [1, 1]
