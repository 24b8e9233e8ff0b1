"""Every shape of preference data in every kind of file: one conversation comes out, or one line that refuses it."""

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fpo.stages.data.chat import Example, Message, Turns
from fpo.stages.data.preferences import load_preferences

ASKED = "What is the capital of France?"
GOOD, BAD = "Paris, of course.", "Lyon, I think."
SYSTEM = "Be brief.\nBe kind."
USER, YES, NO = Message("user", ASKED), Message("assistant", GOOD), Message("assistant", BAD)
TALK = (Message("user", "Hello, you"), Message("assistant", "Hello."), USER)


def said(*turns: Message) -> list[dict[str, Any]]:
    """Turns in OpenAI's form."""
    return [{"role": turn.role, "content": turn.content} for turn in turns]


def shared(*turns: Message) -> list[dict[str, Any]]:
    """Turns in ShareGPT's form."""
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return [{"from": names[turn.role], "value": turn.content} for turn in turns]


def parts(*turns: Message) -> list[dict[str, Any]]:
    """Turns whose content is in parts."""
    return [
        {
            "role": turn.role,
            "content": [{"type": "text", "text": text} for text in (turn.content[:3], turn.content[3:])],
        }
        for turn in turns
    ]


def dialogue(*turns: Message) -> str:
    """Turns as Anthropic-HH writes them."""
    names = {"user": "Human", "assistant": "Assistant"}
    return "".join(f"\n\n{names[turn.role]}: {turn.content}" for turn in turns)


def asked(*before: Message, chosen: Turns = (YES,), rejected: Turns = (NO,), **more: Any) -> Example:
    return Example((*before, USER), chosen, rejected, **more)


TEXTS = {"chosen": GOOD, "rejected": BAD}
LISTS = {"chosen": said(YES), "rejected": said(NO)}
SHARES = {"chosen": shared(YES)[0], "rejected": shared(NO)[0]}
TOOLS = tuple(
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "d",
            "parameters": {"type": "object", "properties": {key: {"type": kind}}},
        },
    }
    for name, key, kind in (("search", "query", "string"), ("add", "number", "integer"))
)


def call(name: str, arguments: Any, number: str = "1") -> dict[str, Any]:
    return {"id": number, "type": "function", "function": {"name": name, "arguments": arguments}}


CALLED = Message("assistant", "", {"tool_calls": [call("search", {"query": "France"})]})
RESULT = Message("tool", "Paris", {"tool_call_id": "1"})
CALLING = [
    {"role": "assistant", "content": None, "tool_calls": [call("search", '{"query": "France"}')]},
    {"role": "tool", "content": "Paris", "tool_call_id": "1"},
]
S = Message("system", SYSTEM)

# By what it is called: a row, and the example that it holds.
SHAPES: dict[str, tuple[dict[str, Any], Example]] = {
    "prompt, text": ({"prompt": ASKED, **TEXTS}, Example(ASKED, GOOD, BAD)),
    "prompt, text; messages": ({"prompt": ASKED, **LISTS}, asked()),
    "prompt, messages": ({"prompt": said(*TALK), **LISTS}, asked(*TALK[:-1])),
    "prompt, messages; text": ({"prompt": said(*TALK), **TEXTS}, asked(*TALK[:-1])),
    "messages alone": ({"chosen": said(USER, YES), "rejected": said(USER, NO)}, asked()),
    "UltraFeedback binarized": (
        {
            "prompt": ASKED,
            "prompt_id": "9f3",
            "chosen": said(USER, YES),
            "rejected": said(USER, NO),
            "messages": said(USER, YES),
            "score_chosen": 8.5,
            "score_rejected": 3,
        },
        asked(score_chosen=8.5, score_rejected=3.0),
    ),
    "Anthropic-HH": ({"chosen": dialogue(*TALK, YES), "rejected": dialogue(*TALK, NO)}, asked(*TALK[:-1])),
    "Anthropic-HH, prompt apart": (
        {"prompt": dialogue(*TALK) + "\n\nAssistant:", "chosen": f" {GOOD}", "rejected": f" {BAD}"},
        asked(*TALK[:-1]),
    ),
    "text alone": ({"chosen": f"{ASKED} {GOOD}", "rejected": f"{ASKED} {BAD}"}, Example(ASKED, f" {GOOD}", f" {BAD}")),
    "Alpaca": (
        {"instruction": "Answer.", "input": ASKED, **TEXTS},
        Example((Message("user", f"Answer.\n{ASKED}"),), (YES,), (NO,)),
    ),
    "Alpaca, no input": ({"instruction": ASKED, "input": "", **TEXTS}, asked()),
    "Alpaca, input is null": ({"instruction": ASKED, "input": None, **TEXTS}, asked()),
    "Alpaca, system and history": (
        {"system": SYSTEM, "instruction": ASKED, "input": "", "history": [["Hello, you", "Hello."]], **TEXTS},
        asked(S, *TALK[:-1]),
    ),
    "question": ({"question": ASKED, **TEXTS}, asked()),
    "question, system": ({"system": SYSTEM, "question": ASKED, **TEXTS}, asked(S)),
    "prompt, system": ({"system": SYSTEM, "prompt": ASKED, **TEXTS}, asked(S)),
    "prompt, system is null": ({"system": None, "prompt": ASKED, **TEXTS}, asked()),
    "messages alone, system": (
        {"system": SYSTEM, "chosen": said(USER, YES), "rejected": said(USER, NO)},
        asked(S),
    ),
    "Anthropic-HH, system": (
        {"system": SYSTEM, "chosen": dialogue(USER, YES), "rejected": dialogue(USER, NO)},
        asked(S),
    ),
    "argilla's Orca pairs": (
        {"system": SYSTEM, "input": ASKED, **TEXTS, "generations": [GOOD, BAD], "rating": [9.0, 4.0]},
        asked(S),
    ),
    "ShareGPT": ({"conversations": shared(*TALK), **SHARES}, asked(*TALK[:-1])),
    "ShareGPT, system turn": ({"conversations": shared(S, *TALK), **SHARES}, asked(S, *TALK[:-1])),
    "ShareGPT, system and tools": (
        {
            "conversations": shared(USER),
            "system": SYSTEM,
            "tools": json.dumps([t["function"] for t in TOOLS]),
            **SHARES,
        },
        asked(S, tools=TOOLS),
    ),
    "ShareGPT, text": ({"conversations": shared(USER), **TEXTS}, asked()),
    "ShareGPT, a call": (
        {
            "conversations": [
                *shared(USER),
                {"from": "function_call", "value": '{"name": "search", "arguments": {"query": "France"}}'},
                {"from": "observation", "value": "Paris"},
            ],
            "tools": json.dumps(TOOLS),
            **SHARES,
        },
        Example(
            (
                USER,
                Message(
                    "assistant",
                    "",
                    {
                        "tool_calls": [
                            {"type": "function", "function": {"name": "search", "arguments": {"query": "France"}}}
                        ]
                    },
                ),
                Message("tool", "Paris"),
            ),
            (YES,),
            (NO,),
            tools=TOOLS,
        ),
    ),
    "ShareGPT, lists": ({"chosen": shared(*TALK, YES), "rejected": shared(*TALK, NO)}, asked(*TALK[:-1])),
    "OpenAI": (
        {
            "input": {"messages": said(USER), "tools": [], "parallel_tool_calls": True},
            "preferred_output": said(YES),
            "non_preferred_output": said(NO),
        },
        asked(),
    ),
    "OpenAI, tools": (
        {
            "input": {"messages": said(S, USER), "tools": list(TOOLS), "parallel_tool_calls": True},
            "preferred_output": CALLING[:1],
            "non_preferred_output": said(NO),
        },
        asked(S, chosen=(CALLED,), tools=TOOLS),
    ),
    "messages before both": ({"messages": said(*TALK), **TEXTS}, asked(*TALK[:-1])),
    "messages with the chosen one": ({"messages": said(*TALK, YES), **LISTS}, asked(*TALK[:-1])),
    "parts of text": ({"prompt": parts(*TALK), "chosen": parts(YES), "rejected": parts(NO)}, asked(*TALK[:-1])),
    "tools, calls in history": (
        {"prompt": [*said(USER), *CALLING], **LISTS, "tools": list(TOOLS)},
        Example((USER, CALLED, RESULT), (YES,), (NO,), tools=TOOLS),
    ),
    "tools, calls in a response": (
        {"prompt": said(USER), "chosen": [*CALLING, *said(YES)], "rejected": said(NO), "tools": json.dumps(TOOLS)},
        asked(chosen=(CALLED, RESULT, YES), tools=TOOLS),
    ),
    "lists as JSON": (
        {"prompt": json.dumps(said(*TALK)), "chosen": json.dumps(said(YES)), "rejected": json.dumps(said(NO))},
        asked(*TALK[:-1]),
    ),
    "messages as JSON in lists": (
        {"chosen": [json.dumps(m) for m in said(USER, YES)], "rejected": [json.dumps(m) for m in said(USER, NO)]},
        asked(),
    ),
    "responses of several turns": (
        {"chosen": said(USER, YES, *TALK[:2]), "rejected": said(USER, NO, *TALK[:2])},
        asked(chosen=(YES, *TALK[:2]), rejected=(NO, *TALK[:2])),
    ),
    "reasoning": (
        {"prompt": ASKED, "chosen": [{**said(YES)[0], "reasoning_content": "Hm."}], "rejected": said(NO)},
        asked(chosen=(Message("assistant", GOOD, {"reasoning_content": "Hm."}),)),
    ),
    "content is null": (
        {"prompt": ASKED, "chosen": said(YES), "rejected": [{"role": "assistant", "content": None}]},
        asked(rejected=(Message("assistant", ""),)),
    ),
}

Rows = list[dict[str, Any]]


def _parquet(rows: Rows, path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path)


def _lines(rows: Rows, path: Path) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _array(rows: Rows, path: Path) -> None:
    path.write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")


def _table(rows: Rows, path: Path) -> None:
    """As spreadsheets write it: what is no text as JSON, null as nothing."""
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        for row in rows:
            writer.writerow(
                {k: v if isinstance(v, str) else json.dumps(v) if v is not None else "" for k, v in row.items()}
            )


def _packed(write: Callable[[Rows, Path], None]) -> Callable[[Rows, Path], None]:
    def packed(rows: Rows, path: Path) -> None:
        plain = path.with_suffix("")
        write(rows, plain)
        path.write_bytes(gzip.compress(plain.read_bytes()))
        plain.unlink()

    return packed


def _saved(rows: Rows, path: Path) -> None:
    datasets.Dataset.from_list(rows).save_to_disk(path)


def _saved_splits(rows: Rows, path: Path) -> None:
    one = datasets.Dataset.from_list(rows)
    datasets.DatasetDict({"train": one, "test": one.select([0])}).save_to_disk(path)


def _shards(rows: Rows, path: Path) -> None:
    path.mkdir()
    for number, row in enumerate(rows):
        _lines([row], path / f"train-{number}.jsonl")


# By kind: the name of a file or folder, and what writes it.
KINDS: dict[str, tuple[str, Callable[[Rows, Path], None]]] = {
    "Parquet": ("data.parquet", _parquet),
    "JSON lines": ("data.jsonl", _lines),
    "JSON array": ("data.json", _array),
    "CSV": ("data.csv", _table),
    "TSV": ("data.tsv", _table),
    "Parquet, gzip": ("data.parquet.gz", _packed(_parquet)),
    "JSON lines, gzip": ("data.jsonl.gz", _packed(_lines)),
    "JSON array, gzip": ("data.json.gz", _packed(_array)),
    "CSV, gzip": ("data.csv.gz", _packed(_table)),
    "TSV, gzip": ("data.tsv.gz", _packed(_table)),
    "folder of shards": ("folder", _shards),
    "save_to_disk, data set": ("saved", _saved),
    "save_to_disk, splits": ("splits", _saved_splits),
}
# Rows that are refused, by what is wrong.
REFUSED: dict[str, dict[str, Any]] = {
    "no known columns": {"text": "Hello", "label": 1},
    "other names": {"query": ASKED, "preferred": GOOD, "dispreferred": BAD},
    "other letters": {"Prompt": ASKED, "Chosen": GOOD, "Rejected": BAD},
    "one response alone": {"prompt": ASKED, "chosen": GOOD},
    "system under another name": {"system_prompt": SYSTEM, "prompt": ASKED, **TEXTS},
    "system in other letters": {"System": SYSTEM, "prompt": ASKED, **TEXTS},
    "a context": {"context": "France has a capital.", "question": ASKED, **TEXTS},
    "an input beside a prompt": {"prompt": ASKED, "input": "Use one word.", **TEXTS},
    "images": {"prompt": ASKED, "images": ["a.png"], **TEXTS},
    "a part that is an image": {
        "prompt": [{"role": "user", "content": [{"type": "image_url", "text": None}, {"type": "text", "text": "a"}]}],
        **LISTS,
    },
    "two system turns": {"system": "Be long.", "prompt": said(S, USER), **LISTS},
    "messages of another conversation": {"prompt": ASKED, "messages": said(*TALK, YES), **LISTS},
    "messages that end with another answer": {"messages": said(*TALK, NO), "chosen": GOOD, "rejected": "No."},
    "a prompt that the lists do not say": {
        "prompt": "And Spain?",
        "chosen": said(USER, YES),
        "rejected": said(USER, NO),
    },
    "a column that may be the prompt": {"ask": ASKED, "chosen": f"Sure. {GOOD}", "rejected": f"Sure. {BAD}"},
    "system, no prompt": {"system": SYSTEM, "chosen": f"Sure. {GOOD}", "rejected": f"Sure. {BAD}"},
    "lists as Python writes them": {"prompt": ASKED, "chosen": str(said(YES)), "rejected": str(said(NO))},
    "a speaker who is unknown": {"conversations": [{"from": "narrator", "value": ASKED}], **SHARES},
    "tools without a name": {"prompt": said(USER), **LISTS, "tools": [{"type": "function"}]},
}
# What is written of each, after its address.
ADDRESS = "…: "


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("hf"))


@pytest.mark.parametrize("kind", KINDS)
def test_every_shape_is_read_from_every_kind_of_file(kind: str, tmp_path: Path) -> None:
    name, write = KINDS[kind]
    hashes: dict[str, str] = {}
    for shape, (row, expected) in SHAPES.items():
        folder = tmp_path / shape
        folder.mkdir()
        write([row, row], folder / name)
        found = load_preferences(str(folder / name), split="train")
        assert [found.example(i) for i in range(len(found))] == [expected, expected], shape
        assert found.guessed_prompts == 2 * (shape == "text alone")
        hashes[shape] = found.content_hash
        # The same conversation has one hash, whatever its shape.
        assert all((hashes[other] == hashes[shape]) == (SHAPES[other][1] == expected) for other in hashes)


def refusal(name: str, folder: Path) -> str:
    _lines([REFUSED[name]], folder / "data.jsonl")
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as caught:
        found = load_preferences(str(folder / "data.jsonl"), split="train")
        assert found.content_hash
    return str(caught.value).removeprefix(str(folder / "data.jsonl"))


def test_the_table(committed_section: Callable[[str, str], None], tmp_path: Path) -> None:
    rows = [f"| {name} | {', '.join(f'`{column}`' for column in row)} |" for name, (row, _) in SHAPES.items()]
    refusals = [f"| {name} | `{refusal(name, tmp_path).lstrip(':, ')}` |" for name in REFUSED]
    committed_section(
        "Preference data",
        f"{len(SHAPES)} shapes are read, each from {len(KINDS)} kinds of files and folders ({'; '.join(KINDS)}): the "
        "same conversation gives the same example and the same hash.\n\n"
        + "\n".join(["| shape | columns |", "| --- | --- |", *rows])
        + f"\n\n{len(REFUSED)} are refused, each with one line:\n\n"
        + "\n".join(["| rows with | answer |", "| --- | --- |", *refusals]),
    )
