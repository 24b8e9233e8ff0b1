"""Success and win rates from samples written by hand."""

import json
from pathlib import Path

import pytest
from fpo.pipeline.report.success import read_answers, success_record

SORT, PICK = "Sort upwards: nine, two.", "Pick one of the animals: fig, owl, cat."
PROMPT = "<bos><user>{}<end><assistant>"


def evaluation(folder: Path, answers: dict[str, list[tuple[str, bool]]]) -> Path:
    folder.mkdir()
    rows = [
        {"prompt": PROMPT.format(asked), "sample": said, "tokens": 3, "logp": -1.0, "finished": finished}
        for asked, samples in answers.items()
        for said, finished in samples
    ]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]  # as `fpo evaluate` writes them
    (folder / "samples.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def one(tmp_path):
    return evaluation(
        tmp_path / "one",
        {
            SORT: [("two, nine.", True), ("Sure: nine, two.", True)],
            PICK: [("it is owl.", True), ("it is cat. That is all.", True)],
        },
    )


@pytest.fixture
def other(tmp_path):
    return evaluation(
        tmp_path / "other",
        {
            SORT: [("two, nine.", False), ("Sure: nine, two.", True)],
            PICK: [("it is cat.", True), ("Sure: it is dog.", True)],
        },
    )


def test_verdicts_are_those_of_a_hand(one, other):
    found = read_answers(one)
    assert found.prompts == (SORT, PICK)
    assert found.right_PA.tolist() == [[True, False], [True, True]]
    assert found.counterpart_PA.tolist() == [[False, True], [False, False]]
    assert found.success_P.tolist() == [0.5, 1.0]
    assert found.ended_PA.all()
    cut = read_answers(other)  # a right text that did not end is not right
    assert cut.right_PA.tolist() == [[False, False], [True, False]]
    assert cut.ended_PA.tolist() == [[False, True], [True, True]]


def test_the_record_has_success_wins_and_the_shift_of_style(one, other):
    found = success_record(read_answers(one), read_answers(other))
    # Wins on the first prompt: 3/4 of right against wrong pairs are ties; on the second, a right one meets a wrong one
    # in half of the pairs.
    assert found == {
        "success/right": 0.75,
        "success/counterpart": 0.25,
        "success/ended": 1.0,
        "success/win_rate": (0.75 + 0.75) / 2,
        # Frames: ("", ""), ("Sure: ", ""), ("", " That is all.") in 2, 1, 1 of 4; the other's in 1, 2, 0 of 3.
        "style/shift": pytest.approx(0.5 * (abs(2 / 4 - 1 / 3) + abs(1 / 4 - 2 / 3) + 1 / 4)),
    }
    assert success_record(read_answers(one), read_answers(one))["success/win_rate"] == 0.5


def test_answers_to_other_prompts_are_not_compared(one, tmp_path):
    lone = evaluation(tmp_path / "lone", {SORT: [("two, nine.", True), ("two, nine.", True)]})
    with pytest.raises(ValueError, match="same prompts"):
        read_answers(one).wins_P(read_answers(lone))


@pytest.mark.parametrize("end", ["\u2028", "\u2029", "\x85", "\x1e"])
def test_an_answer_may_hold_what_unicode_calls_the_end_of_a_line(tmp_path, end):
    found = read_answers(evaluation(tmp_path / "odd", {SORT: [(f"two,{end} nine.", True), ("two, nine.", True)]}))
    assert found.right_PA.tolist() == [[False, True]]


def test_shares_by_family_are_those_of_its_prompts(one):
    assert read_answers(one).by_family() == {"order": (0.5, 0.5), "pick": (1.0, 0.0)}
