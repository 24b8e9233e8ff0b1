import hashlib
import json
import re
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fpo.stages.data.chat import Example, Message
from fpo.stages.data.preferences import Preferences, load_preferences
from hypothesis import given
from hypothesis import strategies as st
from trl.data_utils import extract_prompt

PROMPT = [
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "Paris."},
    {"role": "user", "content": "Are you sure?\n\nThink."},
]
GOOD = [{"role": "assistant", "content": "I am."}]
BAD = [{"role": "assistant", "content": "I am not."}]
DIALOGUE = (
    "\n\nHuman: What is the capital of France?\n\nAssistant: Paris.\n\nHuman: Are you sure?\n\nThink.\n\nAssistant:"
)
SCORES = {"score_chosen": 8.5, "score_rejected": 3.0}
SHAPES: dict[str, dict[str, Any]] = {
    "ultrafeedback": {"prompt": "What is the capital of France?", "chosen": PROMPT + GOOD, "rejected": PROMPT + BAD},
    "implicit": {"chosen": PROMPT + GOOD, "rejected": PROMPT + BAD},
    "explicit": {"prompt": PROMPT, "chosen": GOOD, "rejected": BAD},
    "hh": {"chosen": DIALOGUE + " I am.", "rejected": DIALOGUE + " I am not."},
    "hh explicit": {"prompt": DIALOGUE, "chosen": " I am.", "rejected": " I am not."},
}
HELLO = (Message("user", "Hello"),)


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("hf"))


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        path.write_text(json.dumps(rows, indent=2))
    return path


def of_rows(*rows: dict[str, Any]) -> Preferences:
    return Preferences(rows, source="rows", split="train")


def plain_row(number: int, **columns: Any) -> dict[str, Any]:
    return {"prompt": f"prompt {number}", "chosen": "yes", "rejected": "no", **columns}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_of_one_conversation_gives_one_example(shape: str) -> None:
    def turns(messages: list[dict[str, str]]) -> tuple[Message, ...]:
        return tuple(Message(**message) for message in messages)

    expected = Example(turns(PROMPT), turns(GOOD), turns(BAD), 8.5, 3.0)
    assert of_rows(SHAPES[shape] | SCORES).example(0) == expected


def test_the_prompt_text_counts_where_the_lists_hold_answers_alone() -> None:
    example = of_rows({"prompt": "Hello", "chosen": GOOD, "rejected": BAD}).example(0)
    assert example.prompt == HELLO


words = st.lists(st.sampled_from(["a", "b", "ab", " ", "  "]), min_size=1, max_size=6).map("".join)


@given(words, words, words)
def test_implicit_text_is_cut_where_trl_cuts_it(prompt: str, chosen: str, rejected: str) -> None:
    # TRL's own loop never leaves the range when one text begins the other, and reads before the start of the first.
    row = {"chosen": f"Q{prompt}{chosen}.", "rejected": f"Q{prompt}{rejected}!"}
    example = of_rows(row).example(0)
    assert vars(example) | extract_prompt(row) == vars(example)


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        ("same", "same", ("", "same", "same")),
        ("The end", "The end.", ("The end", "", ".")),
        (PROMPT, PROMPT + GOOD, (tuple(Message(**m) for m in PROMPT), (), (Message("assistant", "I am."),))),
        ([], PROMPT[:2], ((Message("user", PROMPT[0]["content"]),), (), (Message("assistant", "Paris."),))),
        (None, None, ("", "", "")),
    ],
)
def test_a_missing_or_equal_answer_is_kept_apart_from_the_prompt(chosen: Any, rejected: Any, expected: Any) -> None:
    example = of_rows({"chosen": chosen, "rejected": rejected}).example(0)
    assert (example.prompt, example.chosen, example.rejected) == expected


@pytest.mark.parametrize("format_and_shape", [(f, s) for f in ("parquet", "json", "jsonl") for s in SHAPES])
def test_content_hash_depends_on_no_format_shape_or_other_column(
    tmp_path: Path, format_and_shape: tuple[str, str]
) -> None:
    suffix, shape = format_and_shape
    rows = [SHAPES[shape] | SCORES | {"comment": shape}, SHAPES[shape] | {"score_chosen": 1, "score_rejected": None}]
    loaded = load_preferences(str(write(tmp_path / f"anything.{suffix}", rows)), split="train")
    assert loaded.split == "train"
    assert (
        loaded.content_hash
        == of_rows(SHAPES["implicit"] | SCORES, SHAPES["implicit"] | {"score_chosen": 1.0}).content_hash
    )


def test_content_hash_sees_every_change() -> None:
    row = SHAPES["implicit"] | SCORES
    user = [{"role": "user", "content": "What is the capital of Spain?"}]
    variants = [
        (row,),
        (row, row),
        (row | {"score_chosen": 8.25},),
        (row | {"score_chosen": None},),
        (row | {"score_rejected": None},),
        (row | {"chosen": PROMPT + BAD, "rejected": PROMPT + GOOD},),
        (row | {"chosen": user + PROMPT[1:] + GOOD, "rejected": user + PROMPT[1:] + BAD},),
        (row | {"chosen": PROMPT[:1] + GOOD, "rejected": PROMPT[:1] + BAD},),
        (
            row
            | {"chosen": [{**PROMPT[0], "role": "system"}, *GOOD], "rejected": [{**PROMPT[0], "role": "system"}, *BAD]},
        ),
        (plain_row(0), plain_row(1)),
        (plain_row(1), plain_row(0)),
    ]
    assert len({of_rows(*rows).content_hash for rows in variants}) == len(variants)


def test_limit_selects_the_first_rows(tmp_path: Path) -> None:
    rows = [plain_row(i) for i in range(5)]
    source = str(write(tmp_path / "train.jsonl", rows))
    limited = load_preferences(source, split="train", limit=3)
    assert len(limited) == 3
    assert limited.content_hash == of_rows(*rows[:3]).content_hash
    assert len(load_preferences(source, split="train", limit=9)) == 5
    with pytest.raises(ValueError, match="at least 1 row, found 0"):
        load_preferences(source, split="train", limit=0)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": 3}, "'chosen', found int"),
        ({"prompt": 1.5}, "'prompt', found float"),
        ({"chosen": [{"role": "user", "text": "Hello"}]}, "'role' and 'content' as text in 'chosen'"),
        ({"chosen": PROMPT + GOOD}, "text beside messages"),
        ({"score_chosen": "high"}, "finite number or null in 'score_chosen', found 'high'"),
        ({"score_rejected": float("nan")}, "'score_rejected', found nan"),
    ],
)
def test_an_unusable_row_is_an_error_with_its_number(row: dict[str, Any], message: str) -> None:
    data = of_rows(plain_row(0), plain_row(1, **row))
    with pytest.raises(ValueError, match=f"row 1 of split 'train': .*{message}"):
        data.example(1)
    with pytest.raises(ValueError, match="row 1 "):
        _ = data.content_hash


def test_unknown_columns_are_answered_with_the_nearest_shape_and_how_to_rename(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [{"Prompt": "Hello", "preferred": "Hi", "loser": "Ha"}])
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as caught:
        load_preferences(str(source), split="train")
    assert "found columns 'Prompt', 'preferred', 'loser'" in str(caught.value)
    renames = re.findall(r"--map (\S+)", str(caught.value))
    assert renames == ["prompt=Prompt", "chosen=preferred", "rejected=loser"]
    found = load_preferences(str(source), split="train", renames=renames)
    assert found.example(0) == Example("Hello", "Hi", "Ha")


def test_the_hash_sees_what_else_a_turn_carries_and_the_tools() -> None:
    call = {"type": "function", "function": {"name": "search", "arguments": {"q": "a"}}}
    other = {"type": "function", "function": {"name": "search", "arguments": {"q": "b"}}}
    tool = {"type": "function", "function": {"name": "search", "parameters": {}}}
    row: dict[str, Any] = {"prompt": PROMPT, "chosen": GOOD, "rejected": BAD}
    variants = [
        row,
        row | {"tools": [tool]},
        row | {"tools": [tool, tool]},
        row | {"chosen": [GOOD[0] | {"tool_calls": [call]}]},
        row | {"chosen": [GOOD[0] | {"tool_calls": [other]}]},
        row | {"chosen": [GOOD[0] | {"reasoning_content": "Hm."}]},
        row | {"rejected": [BAD[0] | {"name": "Ada"}]},
    ]
    assert len({of_rows(one).content_hash for one in variants}) == len(variants)


def test_the_hash_of_ordinary_rows_is_what_it_was() -> None:
    # Of the fingerprints of caches that are there: SHA-256 of prompt, chosen, rejected and scores, a JSON line each.
    turns = [[[message["role"], message["content"]] for message in part] for part in (PROMPT, GOOD, BAD)]
    lines = [[*turns, 8.5, 3.0], ["prompt 1", "yes", "no", None, None]]
    expected = hashlib.sha256("".join(json.dumps(line) + "\n" for line in lines).encode()).hexdigest()
    assert of_rows(SHAPES["explicit"] | SCORES, plain_row(1)).content_hash == expected


def test_guessed_prompts_are_counted_and_nothing_else_is_guessed() -> None:
    alike = {"chosen": "Sure! Here you are. Yes.", "rejected": "Sure! Here you are. No."}
    assert of_rows(alike, alike | {"chosen": None}, {"chosen": "a", "rejected": "b"}, alike).guessed_prompts == 2
    for column in ("question", "prompt", "instruction", "input"):
        found = of_rows({column: "What is it?", **alike})
        assert found.guessed_prompts == 0
        prompt = found.example(0).prompt
        assert (prompt if isinstance(prompt, str) else prompt[0].content) == "What is it?"
        assert of_rows({column: "What is it?", **alike}, {column: None, **alike}).guessed_prompts == 0
    assert of_rows({"source": "a web page", "model": "one of ours", "words": 7, **alike}).guessed_prompts == 1
