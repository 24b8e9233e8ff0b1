import json
from typing import Any

import pytest
from fpo.stages.data.chat import Message
from fpo.stages.data.turns import from_json, read_text, read_tools
from hypothesis import given
from hypothesis import strategies as st

SPEAKERS = {"user": "human", "assistant": "gpt", "system": "system", "tool": "observation"}
ARGUMENTS = {"q": "Paris", "n": [1, {"a": 2}]}
FUNCTION = {"name": "search", "arguments": ARGUMENTS}
CALL = {"id": "1", "type": "function", "function": FUNCTION}
CALLED = Message("assistant", "", {"tool_calls": [CALL]})
TOOL = {"type": "function", "function": {"name": "search", "parameters": {"type": "object", "properties": {}}}}

contents = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
turns = st.lists(st.builds(Message, st.sampled_from(list(SPEAKERS)), contents), min_size=1, max_size=4).map(tuple)


@given(turns, st.data())
def test_every_form_of_a_turn_says_the_same(told, data):
    def part(text: str) -> Any:
        cut = data.draw(st.integers(0, len(text)))
        return [{"type": "text", "text": piece} for piece in (text[:cut], text[cut:])]

    openai = [{"role": turn.role, "content": turn.content} for turn in told]
    sharegpt = [{"from": SPEAKERS[turn.role], "value": turn.content} for turn in told]
    nulls = [one | {"from": None, "value": None, "tool_calls": None, "name": None} for one in openai]
    in_parts = [one | {"content": part(one["content"])} for one in openai]
    assert read_text({key: [one[key] for one in openai] for key in ("role", "content")}, "a") == told
    for form in (openai, sharegpt, nulls, in_parts, [json.dumps(one) for one in openai]):
        assert read_text(form, "a") == told
        assert read_text(from_json(json.dumps(form), "a"), "a") == told
        assert read_text(from_json(json.dumps(json.dumps(form)), "a"), "a") == told
    assert read_text(openai[0], "a") == told[:1]


@given(contents)
def test_text_stays_text(text):
    for said in (
        text,
        json.dumps(text),
        json.dumps([text]),
        json.dumps({"role": "admin", "content": text}),
        f"[{text}",
    ):
        assert read_text(from_json(said, "a"), "a") == said


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "assistant", "content": "", "tool_calls": json.dumps([CALL])},
        {"role": "assistant", "content": None, "tool_calls": [json.dumps(CALL)], "name": None},
        {"role": "assistant", "tool_calls": [CALL | {"function": FUNCTION | {"arguments": json.dumps(ARGUMENTS)}}]},
        {"role": "assistant", "tool_calls": [CALL | {"function": FUNCTION | {"arguments": ARGUMENTS | {"x": None}}}]},
        {"role": "assistant", "tool_calls": [CALL | {"index": None}], "tool_call_id": None},
    ],
)
def test_a_call_has_one_form_however_it_is_stored(message):
    assert read_text([message], "a") == (CALLED,)


def test_calls_of_sharegpt_and_of_openai_before_there_were_tools():
    function = {"name": "search", "arguments": {"q": "Paris"}}
    expected = (Message("assistant", "", {"tool_calls": [{"type": "function", "function": function}]}),)
    assert read_text([{"from": "function_call", "value": json.dumps(function)}], "a") == expected
    old = {"role": "assistant", "content": None, "function_call": function | {"arguments": '{"q": "Paris"}'}}
    assert read_text([old], "a") == expected
    assert read_text([{"role": "function", "name": "search", "content": "1"}], "a") == (
        Message("tool", "1", {"name": "search"}),
    )


def test_arguments_that_are_no_object_are_kept_as_the_model_wrote_them():
    call = {"type": "function", "function": {"name": "search", "arguments": '{"q": '}}
    assert read_text([{"role": "assistant", "tool_calls": [call]}], "a") == (
        Message("assistant", "", {"tool_calls": [call]}),
    )


def test_what_a_template_reads_is_carried_and_nothing_else():
    more = {"name": "Ada", "tool_call_id": "1", "reasoning_content": "Hm.", "thinking": "Ah.", "reasoning": "Oh."}
    assert read_text([{"role": "user", "content": "a", "id": 7, "rating": 5.0, **more}], "a") == (
        Message("user", "a", more),
    )


@pytest.mark.parametrize(
    "stored",
    [
        [TOOL],
        json.dumps([TOOL]),
        [json.dumps(TOOL)],
        TOOL,
        [TOOL["function"]],
        json.dumps([TOOL["function"]]),
        [{**TOOL, "strict": None, "function": {**TOOL["function"], "description": None}}],
        [{**TOOL, "function": {**TOOL["function"], "parameters": json.dumps(TOOL["function"]["parameters"])}}],
    ],
)
def test_tools_have_one_form_however_they_are_stored(stored):
    assert read_tools(stored, "tools") == (TOOL,)
    assert read_tools(None, "tools") == read_tools([], "tools") == read_tools("", "tools") == ()


@pytest.mark.parametrize(
    ("value", "part"),
    [
        (3, "expected text or messages in 'a', found int"),
        ([3], "'role' and 'content' as text in 'a', found 3"),
        ({"role": ["user"], "content": ["a", "b"]}, "as lists of one length in 'a'"),
        ({"role": ["user"], "content": "a"}, "as lists of one length in 'a'"),
        ([{"role": "user"}], "'role' and 'content' as text"),
        ([{"role": "user", "content": 3}], "'role' and 'content' as text"),
        ([{"role": None, "content": "a"}], "'role' and 'content' as text"),
        ([{"from": "narrator", "value": "a"}], "as 'from' in 'a', found 'narrator'"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "found a part of type 'image_url'"),
        ([{"role": "user", "content": [{"type": "tool_use", "text": "a"}]}], "found a part of type 'tool_use'"),
        ([{"role": "user", "content": "a", "images": ["b"]}], "found 'images' in one of 'user'"),
        ([{"role": "assistant", "tool_calls": [{"id": "1"}]}], "calls of tools with a name"),
        ([{"role": "assistant", "content": "a", "weight": 0}], "found one of OpenAI's 'weight' 0"),
        ([{"from": "function_call", "value": "search()"}], "calls of tools with a name"),
    ],
)
def test_what_says_no_turns_is_refused_by_name(value, part):
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as caught:
        read_text(value, "a")
    assert part in str(caught.value)


def test_messages_as_python_writes_them_are_no_text():
    for value in ([{"role": "user", "content": "a"}], {"content": "a", "role": "user"}):
        with pytest.raises(ValueError, match=r"use json\.dumps"):
            from_json(str(value), "a")


@pytest.mark.parametrize("tools", ["search", [{"type": "function"}], [3], {"a": 1}])
def test_what_says_no_tools_is_refused(tools):
    with pytest.raises(ValueError, match="in 'tools', found"):
        read_tools(tools, "tools")
