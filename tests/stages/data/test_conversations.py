import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chats import FORMATS
from fpo.cache.errors import UserError
from fpo.stages.data import conversations
from fpo.stages.data.chat import ChatFormat, Example, Message, Turns
from fpo.stages.data.conversations import (
    CONVERSATION_SKIP_REASONS,
    Conversations,
    load_conversations,
    tokenize_conversation,
)
from fpo.stages.data.rendering import LEFT_OUT, SHARED
from fpo.stages.data.tokenize import Limits, tokenize_pair
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import Template
from pairs import few_examples
from tiny_tokenizers import CHATML, chatml

LONG = 10_000


def turns(*said: str) -> Turns:
    """User and assistant in turn."""
    return tuple(Message(("user", "assistant")[i % 2], text) for i, text in enumerate(said))


def messages(conversation: Turns) -> dict[str, Any]:
    return {"messages": [{"role": m.role, "content": m.content, **m.more} for m in conversation]}


TWO = turns("Hello", "Hi.", "Who?", "Me.")
GEMMA_PARTS = [
    ("<bos><start_of_turn>user\nHello<end_of_turn>\n<start_of_turn>model\n", False),
    ("Hi.<end_of_turn>", True),
    ("\n<start_of_turn>user\nWho?<end_of_turn>\n<start_of_turn>model\n", False),
    ("Me.<end_of_turn>", True),
]
CHATML_PARTS = [
    ("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n", False),
    ("Hi.<|im_end|>", True),
    ("\n<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n", False),
    ("Me.<|im_end|>", True),
]
BARE_PARTS = [
    ("<bos>user:\nHello\nassistant:\n", False),
    ("Hi.<eos>", True),
    ("\nuser:\nWho?\nassistant:\n", False),
    ("Me.<eos>", True),
]


@pytest.mark.parametrize(
    ("name", "conversation", "parts"),
    [
        ("gemma", TWO, GEMMA_PARTS),
        ("gemma", (*TWO, Message("user", "Thanks.")), GEMMA_PARTS),
        ("gemma", (Message("system", "Hello"), Message("user", " "), *TWO[1:]), GEMMA_PARTS),
        ("chatml", (Message("system", "Be brief."), *TWO), CHATML_PARTS),
        ("no end of turn", TWO, BARE_PARTS),
    ],
    ids=["gemma", "gemma, unanswered end", "gemma, folded system turn", "chatml", "no end of turn"],
)
def test_the_assistant_s_turns_are_learnt_with_the_token_that_closes_them(name, conversation, parts):
    chat = FORMATS[name]
    (found,), skipped, truncated = tokenize_conversation(conversation, chat, LONG)
    assert (skipped, truncated) == ([], [False])
    encoded = [chat.tokenizer(text, add_special_tokens=False)["input_ids"] for text, _ in parts]
    assert found.ids.tolist() == [token for ids in encoded for token in ids]
    assert found.learnt.tolist() == [
        learnt for ids, (_, learnt) in zip(encoded, parts, strict=True) for _ in range(len(ids))
    ]
    assert (found.ids.dtype, found.learnt.dtype) == (np.int32, np.bool_)


# No white space at the ends: templates may trim it, and that is theirs to decide.
texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).map(str.strip).filter(bool)
said_in_turn = st.lists(st.tuples(texts, texts), min_size=1, max_size=4).map(
    lambda both: turns(*(text for one in both for text in one))
)


# Where turns end in plain text, the text that follows may share a token with them.
@pytest.mark.parametrize("name", ["chatml", "gemma", "no end of turn"])
@few_examples
@given(conversation=said_in_turn)
def test_the_ids_are_those_of_the_rendered_conversation_and_the_mask_those_of_the_answers(name, conversation):
    chat = FORMATS[name]
    bos, end = chat.tokenizer.bos_token or "", chat.tokenizer.decode([chat.end_id])
    (found,), _, _ = tokenize_conversation(conversation, chat, LONG)
    rendered = Template(chat.template).render(messages=messages(conversation)["messages"], bos_token=bos)
    text = chat.tokenizer.decode(found.ids)
    if name == "no end of turn":
        rendered, text = bos + rendered, text.replace(end, "")
    assert text == rendered.rstrip()
    answers = "".join(message.content + end for message in conversation if message.role == "assistant")
    assert chat.tokenizer.decode(found.ids[found.learnt]) == answers


@pytest.mark.parametrize("name", FORMATS)
@few_examples
@given(asked=texts, answered=texts, system=st.none() | texts)
def test_a_conversation_of_one_answer_is_a_pair_s_prompt_and_response(name, asked, answered, system):
    chat = FORMATS[name]
    prompt = (*((Message("system", system),) if system else ()), Message("user", asked))
    sides = [(Message("assistant", text),) for text in (answered, answered + " Not.")]
    pair = tokenize_pair(Example(prompt, *sides), 0, chat, Limits(LONG, LONG - 1)).pair
    for side, ids in zip(sides, (pair.chosen_ids, pair.rejected_ids), strict=True):
        (found,), _, _ = tokenize_conversation(prompt + side, chat, LONG)
        assert found.ids.tolist() == [*pair.prompt_ids, *ids]
        assert found.learnt.tolist() == [False] * pair.prompt_ids.size + [True] * ids.size


@few_examples
@given(conversation=said_in_turn, max_length=st.integers(1, 80))
def test_what_is_too_long_loses_its_end(conversation, max_length):
    (whole,), _, _ = tokenize_conversation(conversation, FORMATS["gemma"], LONG)
    kept, skipped, truncated = tokenize_conversation(conversation, FORMATS["gemma"], max_length)
    if not whole.learnt[:max_length].any():
        assert (kept, skipped, truncated) == ([], ["no learnt token after truncation"], [])
        return
    (found,) = kept
    assert found.ids.tolist() == whole.ids[:max_length].tolist()
    assert found.learnt.tolist() == whole.learnt[:max_length].tolist()
    assert (skipped, truncated) == ([], [whole.ids.size > max_length])


CALL = {"tool_calls": [{"type": "function", "function": {"name": "search", "arguments": "{}"}}]}
SKIPPED: dict[str, Turns] = {
    "no messages": (),
    "no assistant turn": TWO[:1],
    "no turn before the first answer": TWO[1:],
    "empty response": turns("Hello", "Hi.", "Who?", " \n"),
    LEFT_OUT: (*TWO[:1], Message("assistant", "", CALL), *TWO[2:]),
    "refused by the chat template": (TWO[0], Message("system", "Be brief."), *TWO[1:]),
    "no learnt token after truncation": turns("Hello " * 30, "Hi."),
}


@pytest.mark.parametrize("reason", SKIPPED)
def test_a_conversation_that_teaches_nothing_is_skipped_with_its_reason(reason):
    assert tokenize_conversation(SKIPPED[reason], FORMATS["gemma"], 64) == ([], [reason], [])
    assert reason in CONVERSATION_SKIP_REASONS


def test_what_shares_a_token_with_its_prompt_is_not_learnt_and_counted():
    spaced = ChatFormat(
        chatml(), CHATML.replace("assistant\n'", "assistant '").replace("m['role'] + '\n'", "m['role'] + ' '")
    )
    # In " Paris" the space is part of the word's token, in " 7" it is not.
    found, skipped, truncated = tokenize_conversation(turns("Hello", "Paris.", "Who?", "7"), spaced, LONG)
    assert (skipped, truncated) == ([SHARED], [False])
    assert spaced.tokenizer.decode(found[0].ids[found[0].learnt]) == "7<|im_end|>"


# Templates that render a turn differently once another follows: of an answer they drop the reasoning, or the end.
REASONED = turns("Hello", "<think>A</think>Hi.", "Who?", "<think>B</think>Me.")
DROPPING = CHATML.replace("m['content']", "(m['content'] if loop.last else m['content'].split('</think>')[-1])")
OPENING = DROPPING.replace("m['content'] if loop.last else ", "").replace("assistant\n'", "assistant\n<think>'")
OTHER_END = CHATML.replace(
    "'<|im_end|>'", "('<|endoftext|>' if loop.last and m['role'] == 'assistant' else '<|im_end|>')"
)


@pytest.mark.parametrize(
    ("template", "lessons"),
    [
        (DROPPING, [("<think>A</think>Hi.<|im_end|>", "Hello"), ("<think>B</think>Me.<|im_end|>", "Hi.<|im_end|>\n")]),
        # The model is asked with `<think>`, so it goes on from there.
        (OPENING, [("A</think>Hi.<|im_end|>", "<think>"), ("B</think>Me.<|im_end|>", "\nHi.<|im_end|>\n")]),
        (
            OTHER_END,
            [("<think>A</think>Hi.<|endoftext|>", "Hello"), ("<think>B</think>Me.<|endoftext|>", "Hi.<|im_end|>")],
        ),
    ],
)
def test_an_answer_is_learnt_as_it_is_rendered_while_it_is_the_last(template, lessons):
    chat = ChatFormat(chatml(), template)
    found, skipped, _ = tokenize_conversation(REASONED, chat, LONG)
    assert skipped == []
    assert len(found) == len(lessons)
    for number, (one, (said, before)) in enumerate(zip(found, lessons, strict=True)):
        assert chat.tokenizer.decode(one.ids[one.learnt]) == said
        asked = chat.tokenizer.decode(one.ids[~one.learnt])
        assert before in asked
        # As the model is served: asked by the template's rendering of what was said before.
        served = [vars(message) for message in REASONED[: 2 * number + 1]]
        assert asked == chat.tokenizer.apply_chat_template(
            served, chat_template=template, tokenize=False, add_generation_prompt=True
        )


def test_answers_that_are_rendered_alike_stay_in_one_conversation():
    told = (*turns("Hello", "Hi.", "Who?", "Me."), *REASONED[2:])
    chat = ChatFormat(chatml(), DROPPING)
    (found,), _, _ = tokenize_conversation(told, chat, LONG)
    assert chat.tokenizer.decode(found.ids[found.learnt]) == "Hi.<|im_end|>Me.<|im_end|><think>B</think>Me.<|im_end|>"


# Files.


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("hf"))


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=1)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def load(path: Path, name: str = "gemma", max_length: int = 64, **options: Any) -> Conversations:
    return load_conversations(str(path), split="train_sft", chat=FORMATS[name], max_length=max_length, **options)


def test_a_file_gives_its_conversations_in_order_and_counts_the_rest(tmp_path):
    skipped = {reason: told for reason, told in SKIPPED.items() if reason != LEFT_OUT}
    told = [TWO, *skipped.values(), turns("Hello", "Hi."), turns("Hello", "Hi. " * 40), skipped["no messages"]]
    loaded = load(write(tmp_path / "a.jsonl", [messages(one) for one in told]))
    expected = [found for one in told for found in tokenize_conversation(one, FORMATS["gemma"], 64)[0]]
    assert len(loaded) == len(expected) == 3
    order = [2, 0, 1]
    found_at_once = dict(zip(order, loaded.__getitems__(order), strict=True))
    for i, one in enumerate(expected):
        for found in (loaded[i], found_at_once[i]):
            assert found.ids.tolist() == one.ids.tolist()
            assert found.learnt.tolist() == one.learnt.tolist()
            assert (found.ids.dtype, found.learnt.dtype) == (np.int32, np.bool_)
    assert loaded.skipped == {reason: 1 + (reason == "no messages") for reason in skipped}
    assert loaded.truncated == 1
    assert loaded.tokens == sum(one.ids.size for one in expected)
    assert loaded.learnt_tokens == sum(int(one.learnt.sum()) for one in expected)


def test_the_hash_is_that_of_the_content_however_it_is_stored(tmp_path):
    told = [TWO, turns("Hello", "Hi."), turns("Who?", "Me.")]
    rows = [messages(one) for one in told]
    first = load(write(tmp_path / "a.jsonl", rows)).sha256
    (tmp_path / "data").mkdir()
    for i, row in enumerate(rows):
        write(tmp_path / "data" / f"train_sft-{i:05d}-of-00003.parquet", [{"comment": "other columns", **row}])
    assert load(tmp_path).sha256 == first
    longer = write(tmp_path / "b.jsonl", [*rows, messages(TWO)])
    assert load(longer, limit=3).sha256 == first
    others = [load(longer), load(longer, name="chatml", limit=3), load(longer, max_length=20, limit=3)]
    others.append(load(write(tmp_path / "c.jsonl", [rows[1], rows[0], rows[2]])))
    assert len({first, *(other.sha256 for other in others)}) == 5


def test_the_hash_sees_lengths_and_masks():
    def stored(ids: list[list[int]], learnt: list[list[bool]]) -> Conversations:
        other = {"skipped": [None] * len(ids), "truncated": [False] * len(ids), "row": [*range(len(ids))]}
        return Conversations(
            datasets.Dataset.from_dict({"ids": ids, "learnt": learnt, **other}, conversations.FEATURES)
        )

    a, b = [False, True], [False, True, True]
    variants = [
        ([[1, 2], [3, 4, 5]], [a, b]),
        ([[1, 2, 3], [4, 5]], [b, a]),
        ([[1, 2], [3, 4, 5]], [a, [False, False, True]]),
        ([[1, 2], [3, 4, 6]], [a, b]),
    ]
    assert len({stored(*variant).sha256 for variant in variants}) == len(variants)


def test_the_same_data_are_tokenised_once_and_others_again(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", [messages(TWO)])
    first = load(path)
    counted = []
    real = conversations.tokenize_conversation
    monkeypatch.setattr(conversations, "tokenize_conversation", lambda *args: counted.append(args[2]) or real(*args))
    assert load(path).sha256 == first.sha256
    assert counted == []
    assert len(load(path, max_length=30)[0].ids) == 30
    load(path, name="chatml")
    load(path, name="no end of turn")
    assert counted == [30, 64, 64]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([{"role": "user", "content": 3}], "'role' and 'content' as text in 'messages'"),
        ([{"role": "user", "text": "Hello"}], "'role' and 'content' as text in 'messages'"),
    ],
)
def test_a_malformed_row_is_an_error_with_its_number(tmp_path, value, message):
    rows = [messages(TWO), messages(TWO), {"messages": value}]
    with pytest.raises(ValueError, match=rf"\A[^\n]*a.jsonl, row 2 of split 'train_sft': [^\n]*{message}[^\n]*\Z"):
        load(write(tmp_path / "a.jsonl", rows))


@pytest.mark.parametrize("value", ["Hello", 3])
def test_a_column_of_another_type_is_an_error(tmp_path, value):
    with pytest.raises(
        ValueError, match=r"\A[^\n]*a.jsonl, row 0 of split 'train_sft': expected [^\n]*messages[^\n]*found[^\n]*\Z"
    ):
        load(write(tmp_path / "a.jsonl", [{"messages": value}]))


def test_mistakes_in_the_source_are_one_line(tmp_path):
    with pytest.raises(UserError, match=r"\Aexpected conversations at [^\n]*none.jsonl[^\n]*\Z"):
        load(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match=r"\A[^\n]*found columns 'chosen', 'rejected', expected 'messages'[^\n]*\Z"):
        load(write(tmp_path / "a.jsonl", [{"chosen": "a", "rejected": "b"}]))
    with pytest.raises(ValueError, match="at least 1 row, found 0"):
        load(write(tmp_path / "b.jsonl", [messages(TWO)]), limit=0)
