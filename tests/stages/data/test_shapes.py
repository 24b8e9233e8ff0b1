from typing import Any

import pytest
from fpo.stages.data.chat import Example, Message, Turns
from fpo.stages.data.preferences import Read, read_pair
from fpo.stages.data.shapes import PARTS, read_conversation
from hypothesis import given
from hypothesis import strategies as st

TEXTS = {"chosen": "Sure! It is Paris.", "rejected": "Sure! It is Lyon."}
YES, NO = (Message("assistant", text) for text in TEXTS.values())
ASKED = "What is the capital of France?"
USER = Message("user", ASKED)
PROMPTS = ("prompt", "instruction", "question", "input")
READ = {*PROMPTS, "conversations", "messages", "system", "tools", "history"}


def pair(row: dict[str, Any], *other_columns: str) -> Read:
    return read_pair(row, [*row, *other_columns])


def said(*turns: Message) -> list[dict[str, Any]]:
    return [{"role": turn.role, "content": turn.content} for turn in turns]


def lists(*before: Message) -> dict[str, Any]:
    return {"chosen": said(*before, YES), "rejected": said(*before, NO)}


def refused(row: dict[str, Any]) -> str:
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as caught:
        pair(row)
    return str(caught.value)


@pytest.mark.parametrize("name", sorted(PARTS))
@pytest.mark.parametrize("spelled", [str, str.upper, lambda name: name.title().replace("_", " ")])
def test_a_part_of_the_conversation_is_used_or_refused_in_any_spelling(name, spelled):
    """Whatever is in the column is in the example, or the row is refused with the column's name."""
    column = spelled(name)
    for beside in (
        {},
        {"prompt": "Hello."},
        {"question": "Hello."},
        {"conversations": said(Message("user", "Hello."))},
    ):
        if column in beside:
            continue
        tools = [{"type": "function", "function": {"name": "nothing else", "parameters": {"type": "object"}}}]
        for value in ("nothing else", said(Message("user", "nothing else"), YES), tools):
            row = {**TEXTS, **beside, column: value}
            try:
                example, guessed = pair(row)
            except ValueError as error:
                assert repr(column) in str(error)
            else:
                assert column in READ and not guessed
                assert "nothing else" in str(example)


@pytest.mark.parametrize("name", sorted(PARTS))
@pytest.mark.parametrize("nothing", [None, "", [], " \n"])
def test_a_part_that_is_empty_does_not_matter(name, nothing):
    if name != "prompt":
        prompt = pair({"prompt": ASKED, **TEXTS, name: nothing}).example.prompt
        assert prompt == ((USER,) if name in ("system", "tools") else ASKED)


@given(st.text(max_size=8), st.text(max_size=8))
def test_alpaca_s_input_is_a_line_below_its_instruction(instruction, given_input):
    row = {"instruction": instruction, "input": given_input, **TEXTS}
    # As LLaMA-Factory joins them: "\n".join of those that are there.
    said_by_user = "\n".join(part for part in (instruction, given_input) if part.strip())
    assert pair(row).example.prompt == ((Message("user", said_by_user),) if said_by_user else ())


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("system", ["Be brief.", None, ""])
def test_a_system_column_is_a_turn_before_any_prompt(name, system):
    turn = (Message("system", system),) if system else ()
    found = pair({name: ASKED, "system": system, **TEXTS}).example
    assert found == Example((*turn, USER), (YES,), (NO,))
    assert pair({"system": system, **lists(USER)}).example == found
    # A row without it is of the same kind as the others.
    assert pair({name: ASKED, **TEXTS}, "system").example == Example((USER,), (YES,), (NO,))


def test_a_copy_is_ignored_only_where_it_is_one():
    base = {"prompt": ASKED, **lists(USER)}
    expected = Example((USER,), (YES,), (NO,))
    for copy in (said(USER, YES), said(USER)):
        assert pair(base | {"messages": copy}).example == expected
    for other in (said(USER, NO), said(YES), said(USER, YES, USER), said(Message("user", "Else"), YES)):
        assert "'messages'" in refused(base | {"messages": other})
    for copy in ("the capital of France", ASKED.upper(), f" {ASKED}\n", f"\u201c{ASKED}\u201d"):
        assert pair(base | {"question": copy}).example == expected
    for other in ("And of Spain?", "!!", "What is the capital of France, and of Spain?"):
        assert "'question'" in refused(base | {"question": other})
    assert "text of the prompt among the turns" in refused({"prompt": "And of Spain?", **lists(USER)})
    dialogues = {"chosen": f"\n\nHuman: {ASKED}\n\nAssistant: a", "rejected": f"\n\nHuman: {ASKED}\n\nAssistant: b"}
    assert pair({"prompt": ASKED, **dialogues}).example.prompt == (USER,)
    assert "dialogues" in refused({"prompt": "And of Spain?", **dialogues})


def test_a_system_turn_may_be_in_one_of_two_copies_alone():
    system = Message("system", "Be brief.")
    for prompt, told in (((system, USER), (USER,)), ((USER,), (system, USER))):
        expected = Example((system, USER), (YES,), (NO,))
        assert pair({"prompt": said(*prompt), **lists(*told)}).example == expected
    assert "an answer to the prompt" in refused({"prompt": said(USER), **lists(Message("user", "Else"))})


@pytest.mark.parametrize("name", ["messages", "conversations"])
def test_a_conversation_before_both_sides_may_hold_the_chosen_one(name):
    before = (USER, Message("assistant", "Paris."), Message("user", "Sure?"))
    for told in (before, (*before, YES)):
        for sides in (TEXTS, lists()):
            assert pair({name: said(*told), **sides}).example == Example(before, (YES,), (NO,))
    assert pair({name: said(*before, YES), **lists(*before)}).example == Example(before, (YES,), (NO,))
    assert "another answer" in refused({name: said(*before, NO, *before, NO), **TEXTS})


turn_lists = st.lists(st.builds(Message, st.sampled_from(["user", "assistant"]), st.sampled_from("ab")), max_size=4)


@given(turn_lists, turn_lists, turn_lists)
def test_responses_begin_after_the_last_common_turn(common, chosen, rejected):
    parted = bool(chosen and rejected) and chosen[0] != rejected[0]
    example = pair({"chosen": said(*common, *chosen), "rejected": said(*common, *rejected)}).example
    assert (*example.prompt, *example.chosen)[: len(common)] == tuple(common)
    if parted:
        assert example == Example(tuple(common), tuple(chosen), tuple(rejected))


def test_json_is_an_answer_where_one_side_alone_is_messages():
    text = '[{"role": "user", "content": "a"}]'
    assert pair({"prompt": "Write JSON.", "chosen": text, "rejected": "No."}).example == Example(
        "Write JSON.", text, "No."
    )


@pytest.mark.parametrize(
    ("value", "score"), [(8, 8.0), (8.5, 8.5), ("8.5", 8.5), ("", None), (None, None), ("1e3", 1000.0)]
)
def test_scores_are_numbers_also_as_text(value, score):
    assert pair({"prompt": "a", **TEXTS, "score_chosen": value}).example.score_chosen == score


@pytest.mark.parametrize("value", [True, "high", "nan", float("inf"), [1], "1e999"])
def test_a_score_that_is_no_number_is_refused(value):
    assert "expected a finite number or null in 'score_chosen'" in refused(
        {"prompt": "a", **TEXTS, "score_chosen": value}
    )


# Conversations.

TALK: Turns = (USER, YES, Message("user", "Sure?"), NO)
TOOL = {"type": "function", "function": {"name": "search", "parameters": {"type": "object"}}}


def test_conversations_have_the_same_turns():
    shared = [{"from": {"user": "human", "assistant": "gpt"}[t.role], "value": t.content} for t in TALK]
    parts = [{"role": turn.role, "content": [{"type": "text", "text": turn.content}]} for turn in TALK]
    for row in ({"messages": said(*TALK)}, {"conversations": shared}, {"messages": parts}, {"messages": shared}):
        assert read_conversation(row, row) == (TALK, ())
        more = row | {"system": "Be brief.", "tools": [TOOL], "prompt": ASKED, "source": "a"}
        assert read_conversation(more, more) == ((Message("system", "Be brief."), *TALK), (TOOL,))
    assert read_conversation({"messages": None}, ["messages"]) == ((), ())


@pytest.mark.parametrize(
    "more", [{"prompt": "Else?"}, {"images": ["a"]}, {"system_prompt": "b"}, {"context": "A text."}]
)
def test_what_a_conversation_does_not_say_is_refused(more):
    row = {"messages": said(*TALK)} | more
    with pytest.raises(ValueError, match=f"in '{next(iter(more))}'"):
        read_conversation(row, row)
    with pytest.raises(ValueError, match="--map messages=dialogue"):
        read_conversation({"dialogue": said(*TALK)}, ["dialogue"])
