import numpy as np
import pytest
from chats import FORMATS, Scores, answer, example, prompts, texts, user
from fpo.cache.schema import Pair, pair_id
from fpo.stages.data.chat import ChatFormat, Example, Message, Turns
from fpo.stages.data.rendering import ANEW, EMPTY, LEFT_OUT, SHARED
from fpo.stages.data.tokenize import SKIP_REASONS, WHITE_SPACE, Limits, Tokenized, tokenize_pair
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import CHATML, chatml

ROOMY = Limits(10_000, 5_000)


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=50, deadline=None)
@given(prompt=prompts, chosen=texts, rejected=texts, max_prompt=st.integers(2, 40), room=st.integers(1, 20))
def test_truncation_keeps_bos_and_both_ends_of_the_boundary(
    name: str, prompt: Turns, chosen: str, rejected: str, max_prompt: int, room: int
) -> None:
    chat = FORMATS[name]
    limits = Limits(max_prompt + room, max_prompt)
    full_prompt, *full = chat.prompt_and_responses(example(prompt, chosen, rejected))
    done = tokenize_pair(example(prompt, chosen, rejected), 3, chat, limits)
    if done.pair is None:
        left = limits.max_length - min(len(full_prompt), max_prompt)
        alike = {True: ("identical responses", WHITE_SPACE), False: ("identical after truncation",)}
        assert done.skipped in alike[full[0] == full[1]]
        assert full[0].ids[:left] == full[1].ids[:left]
        return
    pair = done.pair
    kept, sides = pair.prompt_ids.tolist(), [pair.chosen_ids.tolist(), pair.rejected_ids.tolist()]
    assert {part.dtype for part in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)} == {np.dtype(np.int32)}
    assert pair.pair_id == pair_id(kept, *sides, 3)
    assert len(kept) == min(len(full_prompt), max_prompt)
    has_bos = chat.bos_id is not None
    assert kept[:has_bos] == full_prompt[:has_bos]
    assert kept[has_bos:] == full_prompt[len(full_prompt) - len(kept) + has_bos :]
    for side, ids in zip(sides, full, strict=True):
        assert side == ids.ids[: limits.max_length - len(kept)]
        assert 0 < len(side) <= limits.max_length - len(kept)
    assert done.prompt_truncated == (kept != full_prompt)
    assert done.responses_truncated == (sides[0] != full[0].ids) + (sides[1] != full[1].ids)


@pytest.mark.parametrize(
    ("pair", "reason"),
    [
        (example(chosen=" \n"), "empty response"),
        (example(rejected=""), "empty response"),
        (Example(user("Hello"), (), answer("Yes.")), "empty response"),
        (example(chosen="Yes.", rejected="Yes."), "identical responses"),
        (example(chosen="Yes.", rejected="Yes. "), WHITE_SPACE),
        (example(chosen="Yes, it is.", rejected="Yes,\n\tit is."), WHITE_SPACE),
        (example("Hello", " Yes.", "Yes."), WHITE_SPACE),
        (example(""), "empty prompt"),
        (example(()), "empty prompt"),
        (example(user(" ")), "empty prompt"),
        (example(scores=(2.0, 2.0)), "tie"),
        (example(chosen="Yes, it is Paris.", rejected="Yes, it is Lyon."), "identical after truncation"),
    ],
)
def test_every_reason_to_skip(pair: Example, reason: str) -> None:
    chat = FORMATS["gemma"]
    prompt_length = 3
    done = tokenize_pair(pair, 0, chat, Limits(prompt_length + 2, prompt_length, drop_ties=True))
    assert done == Tokenized(None, reason, tie=reason == "tie")
    assert reason in SKIP_REASONS


@pytest.mark.parametrize(("scores", "tie"), [((2.0, 2.0), True), ((2.0, 1.0), False), ((None, None), False)])
def test_ties_are_counted_and_kept_unless_told(scores: Scores, tie: bool) -> None:
    kept = tokenize_pair(example(scores=scores), 0, FORMATS["gemma"], ROOMY)
    assert (kept.pair is not None, kept.tie) == (True, tie)
    dropped = tokenize_pair(example(scores=scores), 0, FORMATS["gemma"], Limits(10_000, 5_000, drop_ties=True))
    assert (dropped.skipped, dropped.tie) == ("tie" if tie else None, tie)


@pytest.mark.parametrize(("max_length", "max_prompt_length"), [(8, 8), (8, 9), (8, 1), (8, 0)])
def test_limits_leave_room_for_prompt_and_response(max_length: int, max_prompt_length: int) -> None:
    with pytest.raises(ValueError, match=f"found {max_prompt_length} and {max_length}"):
        Limits(max_length, max_prompt_length)


def call(name: str = "search", arguments: object = '{"q": "Lyon"}') -> Turns:
    function = {"name": name, "arguments": arguments}
    return (Message("assistant", "", {"tool_calls": [{"id": "1", "type": "function", "function": function}]}),)


TOOL_CHATML = CHATML.replace(
    "m['content'] + ", "m['content'] + (m['tool_calls'][0]['function'] | tojson if m['tool_calls'] else '') + "
)
SPACED = CHATML.replace("assistant\n'", "assistant '").replace("m['role'] + '\n'", "m['role'] + ' '")
HIDING = CHATML.replace("m['content']", "(m['content'] if loop.last or m['role'] == 'user' else '-')")
LONGER = answer("No.") + user("Why?") + answer("So.")
CHATML_FORMAT = FORMATS["chatml"]


@pytest.mark.parametrize(
    ("chat", "pair", "reason"),
    [
        # The space before a word is part of its token.
        (ChatFormat(chatml(), SPACED), example(chosen="Paris.", rejected="Lyon."), SHARED),
        (CHATML_FORMAT, example("The capital of France is ", "Paris.", "Lyon."), SHARED),
        # Templates that render a turn otherwise once others follow.
        (
            ChatFormat(chatml(), "{% if messages|length > 2 %}!{% endif %}" + CHATML),
            example(user("Hello") + answer("Hi.") + user("Sure?")),
            None,
        ),
        (
            ChatFormat(chatml(), "{% if messages|length > 3 %}!{% endif %}" + CHATML),
            example(user("Hello") + answer("Hi.") + user("Sure?")),
            ANEW,
        ),
        (
            ChatFormat(chatml(), HIDING),
            Example(user("Hello"), answer("Yes."), LONGER),
            ANEW,
        ),
        # What a template does not write is missing in silence.
        (CHATML_FORMAT, Example(user("Hello"), call(), answer("No.")), LEFT_OUT),
        (CHATML_FORMAT, Example(user("Hello") + call() + user("And?"), answer("Yes."), answer("No.")), LEFT_OUT),
        (CHATML_FORMAT, Example(user("Hello"), answer("Yes."), answer("No."), tools=({"name": "search"},)), LEFT_OUT),
        (
            ChatFormat(
                chatml(), TOOL_CHATML.replace("%}{{ '<|im_start|>'", "if m['role'] != 'tool' %}{{ '<|im_start|>'", 1)
            ),
            Example(user("Hello") + call() + (Message("tool", "42"),), answer("Yes."), answer("No.")),
            LEFT_OUT,
        ),
        (
            ChatFormat(
                chatml(), TOOL_CHATML.replace("m['content'] + (", "('' if m['tool_calls'] else m['content']) + (")
            ),
            Example(user("Hello"), (Message("assistant", "I will look.", call()[0].more),), answer("No.")),
            LEFT_OUT,
        ),
        # A response without a word.
        (CHATML_FORMAT, Example(user("Hello"), user("Yes."), answer("No.")), EMPTY),
        (CHATML_FORMAT, Example(user("Hello"), answer("Yes."), answer("No.") + user("Why?") + answer(" ")), EMPTY),
        (
            ChatFormat(chatml(), CHATML.replace("m['content']", "m['content'].split('</think>')[-1]")),
            example(chosen="<think>Yes.</think>"),
            EMPTY,
        ),
    ],
)
def test_what_cannot_be_cut_is_skipped_with_its_reason(chat: ChatFormat, pair: Example, reason: str | None) -> None:
    done = tokenize_pair(pair, 7, chat, ROOMY)
    assert (done.pair is None, done.skipped) == (reason is not None, reason)
    assert reason is None or reason in SKIP_REASONS


def test_a_template_that_closes_answers_otherwise_is_an_error_with_the_row() -> None:
    chat = ChatFormat(chatml(), CHATML + "{% if messages|length > 3 %}!{% endif %}")
    long = example(user("Hello") + answer("Hi.") + user("Sure?"))
    with pytest.raises(ValueError, match=r"row 7: the chat template .*closes this answer"):
        tokenize_pair(long, 7, chat, ROOMY)


# Responses of several turns.

SEVERAL = Example(user("Hello"), answer("Yes."), LONGER + user("Oh.") + answer("Bye.") + user("unanswered"))


def said(pair: Pair, side: str, chat: ChatFormat) -> list[str]:
    ids, spans = getattr(pair, f"{side}_ids"), getattr(pair, f"{side}_learnt").reshape(-1, 2)
    return [chat.tokenizer.decode(ids[start:stop]) for start, stop in spans]


@pytest.mark.parametrize("name", FORMATS)
def test_all_answers_of_a_response_or_the_last_are_learnt(name: str) -> None:
    chat = FORMATS[name]
    end = "<end_of_turn><eos>" if name == "gemma without turn tokens" else chat.tokenizer.decode([chat.end_id])
    every = tokenize_pair(SEVERAL, 0, chat, ROOMY).pair
    last = tokenize_pair(SEVERAL, 0, chat, Limits(10_000, 5_000, turns="last")).pair
    assert every is not None and last is not None
    assert every.pair_id == last.pair_id
    assert said(every, "chosen", chat) == said(last, "chosen", chat) == [f"Yes.{end}"]
    assert said(every, "rejected", chat) == [f"{text}{end}" for text in ("No.", "So.", "Bye.")]
    assert said(last, "rejected", chat) == [f"Bye.{end}"]
    whole = chat.tokenizer.decode([*every.prompt_ids, *every.rejected_ids])
    turns = [vars(message) for message in SEVERAL.prompt + SEVERAL.rejected[:-1]]
    rendered = chat.tokenizer.apply_chat_template(turns, chat_template=chat.template, tokenize=False).rstrip()
    assert whole.replace("<eos>", "").removeprefix("<bos>") == rendered.removeprefix("<bos>")


def test_responses_may_part_at_a_turn_of_the_user_s() -> None:
    pair = Example(user("Hello") + answer("Hi."), user("Who?") + answer("Me."), user("What?") + answer("It."))
    done = tokenize_pair(pair, 0, CHATML_FORMAT, ROOMY).pair
    assert done is not None
    decode = CHATML_FORMAT.tokenizer.decode
    assert decode(done.prompt_ids) == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nHi.<|im_end|>\n"
    assert decode(done.chosen_ids).startswith("<|im_start|>user\nWho?<|im_end|>\n")
    assert said(done, "chosen", CHATML_FORMAT) == ["Me.<|im_end|>"]
    cut = tokenize_pair(pair, 0, CHATML_FORMAT, Limits(len(done.prompt_ids) + 4, len(done.prompt_ids)))
    assert (cut.pair, cut.skipped) == (None, "no learnt token after truncation")


@given(room=st.integers(1, 60))
@settings(max_examples=60, deadline=None)
def test_a_response_of_several_turns_is_cut_after_a_learnt_token(room: int) -> None:
    whole = tokenize_pair(SEVERAL, 0, CHATML_FORMAT, ROOMY).pair
    assert whole is not None
    prompt = len(whole.prompt_ids)
    done = tokenize_pair(SEVERAL, 0, CHATML_FORMAT, Limits(prompt + room, prompt))
    pair = done.pair
    assert pair is not None
    kept = len(pair.rejected_ids)
    assert pair.rejected_ids.tolist() == whole.rejected_ids[:kept].tolist()
    learnt = {token for span in whole.rejected_learnt.reshape(-1, 2) for token in range(*span)}
    assert {token for span in pair.rejected_learnt.reshape(-1, 2) for token in range(*span)} == learnt & set(
        range(room)
    )
    assert kept == max(learnt & set(range(room))) + 1
    assert done.responses_truncated == (len(whole.chosen_ids) > room) + (len(whole.rejected_ids) > room)


# Tools.


@pytest.mark.parametrize("arguments", ['{"q": "Lyon"}', {"q": "Lyon", "page": None}, '{"q": "Lyon", "page": null}'])
@pytest.mark.parametrize(
    ("arguments_in_template", "written"),
    [("| tojson", '{"q": "Lyon"}'), ("+ ''", '{"q": "Lyon"}'), (".q", "Lyon")],
)
def test_arguments_of_a_call_are_what_the_template_expects(arguments, arguments_in_template, written) -> None:
    if "null" in str(arguments) and arguments_in_template != ".q":
        written = arguments  # said by the model, and not filled in by Arrow
    template = CHATML.replace(
        "m['content'] + ",
        "m['content'] + (m['tool_calls'][0]['function']['name'] + ':' + "
        f"(m['tool_calls'][0]['function']['arguments'] {arguments_in_template}) if m['tool_calls'] else '') + ",
    )
    chat = ChatFormat(chatml(), template)
    pair = tokenize_pair(Example(user("Where?"), call("search", arguments), answer("No.")), 0, chat, ROOMY).pair
    assert pair is not None
    assert chat.tokenizer.decode(pair.chosen_ids) == f"search:{written}<|im_end|>"


def test_tools_and_results_stand_in_the_prompt_and_a_call_may_have_an_end_of_its_own() -> None:
    template = "{% if tools %}{{ tools[0] | tojson }}{% endif %}" + TOOL_CHATML.replace(
        "'<|im_end|>'", "('<|endoftext|>' if m['tool_calls'] else '<|im_end|>')"
    )
    chat = ChatFormat(chatml(), template)
    tools = ({"type": "function", "function": {"name": "search", "description": None}},)
    prompt = user("Where?") + call() + (Message("tool", "Lyon", {"tool_call_id": "1"}),)
    pair = tokenize_pair(Example(prompt, call("open"), answer("Lyon."), tools=tools), 0, chat, ROOMY).pair
    assert pair is not None
    decode = chat.tokenizer.decode
    assert decode(pair.prompt_ids).startswith('{"type": "function", "function": {"name": "search"}}<|im_start|>user\n')
    assert decode(pair.prompt_ids).endswith("<|im_start|>tool\nLyon<|im_end|>\n<|im_start|>assistant\n")
    assert decode(pair.chosen_ids) == '{"name": "open", "arguments": {"q": "Lyon"}}<|endoftext|>'
    assert decode(pair.rejected_ids) == "Lyon.<|im_end|>"


def test_a_conversation_that_the_template_refuses_is_skipped() -> None:
    chat = ChatFormat(
        chatml(), CHATML + "{% if messages|length > 2 %}{{ raise_exception('too many turns') }}{% endif %}"
    )
    refused = tokenize_pair(example(user("Hello") + answer("Hi.") + user("Sure?")), 7, chat, ROOMY)
    assert (refused.pair, refused.skipped) == (None, "refused by the chat template")
    assert tokenize_pair(example(), 8, chat, ROOMY).pair is not None
