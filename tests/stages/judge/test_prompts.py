"""Words for a judge: every field is filled, whatever is in the answers; a file brings others."""

import pytest
from fpo.cache.errors import UserError
from fpo.stages.judge.prompts import (
    FIVE_VERDICTS,
    PAIR_FIELDS,
    PREFERENCE,
    REFERENCE_FIELDS,
    SCORE,
    SCORE_BY_REFERENCE,
    SCORE_FIELDS,
    Template,
)

PAIR = {"question": "What is {x}?", "answer_a": "{answer_b} {0}", "answer_b": "%s {{}}"}


@pytest.mark.parametrize("template", [PREFERENCE, FIVE_VERDICTS])
def test_a_pair_s_words_stand_in_the_message_as_they_are(template):
    *_, asked = template.messages(PAIR)
    assert asked["role"] == "user" and all(text in asked["content"] for text in PAIR.values())
    assert asked["content"].index(PAIR["answer_a"]) < asked["content"].index(PAIR["answer_b"])


def test_a_grade_is_asked_for_with_its_reference_where_there_is_one():
    fields = {"conversation": "User: 1 + 1?", "reference": "two"}
    assert "two" not in SCORE.messages(fields)[-1]["content"]
    assert "two" in SCORE_BY_REFERENCE.messages(fields)[-1]["content"]
    assert [message["role"] for message in SCORE.messages(fields)] == ["system", "user"]


def test_a_file_brings_the_user_s_part_and_perhaps_the_system_s(tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_text("{question} A: {answer_a} B: {answer_b} {{[[A]]}}")
    assert Template.read(path, PAIR_FIELDS).messages({"question": "q", "answer_a": "a", "answer_b": "b"}) == [
        {"role": "user", "content": "q A: a B: b {[[A]]}"}
    ]
    path.write_text("Be fair. {not a field}\n---\n{conversation}")
    found = Template.read(path, SCORE_FIELDS, REFERENCE_FIELDS)
    assert found.messages({"conversation": "c", "reference": ""}) == [
        {"role": "system", "content": "Be fair. {not a field}"},
        {"role": "user", "content": "c"},
    ]


def test_other_words_have_another_hash():
    found = {
        one.sha256 for one in (PREFERENCE, FIVE_VERDICTS, SCORE, Template("", SCORE.user), Template(SCORE.user, ""))
    }
    assert len(found) == 5


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "{question} {answer_a}",
            "expected the fields {answer_a}, {answer_b}, {question}, found {answer_a}, {question}",
        ),
        ("nothing", "found none"),
        ("{question} {answer_a} {answer_b} {more}", "{more}"),
        ("{question", "double other braces"),
    ],
)
def test_a_file_with_other_fields_is_refused_in_one_line(tmp_path, text, words):
    (tmp_path / "prompt.txt").write_text(text)
    with pytest.raises(UserError) as caught:
        Template.read(tmp_path / "prompt.txt", PAIR_FIELDS)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match="found none at"):
        Template.read(tmp_path / "nowhere.txt", PAIR_FIELDS)
