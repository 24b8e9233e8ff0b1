import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fpo.stages.preferences import Example, Message, Preferences, load_preferences
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
    "names",
    [
        ("train.parquet",),
        ("train_prefs.jsonl",),
        ("train/a.parquet", "train/b.parquet"),
        ("data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"),
        ("train-1.jsonl", "train-2.jsonl"),
    ],
)
def test_a_folder_gives_the_files_of_its_split_in_order(tmp_path: Path, names: tuple[str, ...]) -> None:
    for number, name in enumerate(names):
        write(tmp_path / name, [plain_row(number)])
        write(tmp_path / name.replace("train", "test"), [plain_row(9)])
    loaded = load_preferences(str(tmp_path), split="train")
    assert [loaded.example(i).prompt for i in range(len(loaded))] == [f"prompt {i}" for i in range(len(names))]


def test_a_folder_does_not_mix_splits(tmp_path: Path) -> None:
    for name in ("train_sft", "train_prefs", "test"):
        write(tmp_path / f"{name}.jsonl", [plain_row(0)])
    for split in ("train", "validation"):  # the first fits two, the second none
        with pytest.raises(ValueError, match=rf"'{split}', found test.jsonl, train_prefs.jsonl, train_sft.jsonl$"):
            load_preferences(str(tmp_path), split=split)
    write(tmp_path / "train.jsonl", [plain_row(1)])
    assert load_preferences(str(tmp_path), split="train").example(0).prompt == "prompt 1"
    write(tmp_path / "train.parquet", [plain_row(1)])
    with pytest.raises(ValueError, match=r"one kind .* found train.jsonl, train.parquet"):
        load_preferences(str(tmp_path), split="train")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": 3}, "'chosen', found int"),
        ({"prompt": 1.5}, "'prompt', found float"),
        ({"chosen": [{"role": "user", "text": "Hello"}]}, "'role' and 'content' as text in 'chosen'"),
        ({"chosen": PROMPT + GOOD}, "text beside message lists"),
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


def test_mistakes_in_the_source_are_one_line(tmp_path: Path) -> None:
    def refused(source: Path, **settings: Any) -> str:
        with pytest.raises((ValueError, OSError)) as caught:
            load_preferences(str(source), split="train", **settings)
        assert "\n" not in str(caught.value)
        return f"{caught.type.__name__}: {caught.value}"

    assert refused(tmp_path / "nothing.jsonl").startswith("FileNotFoundError: expected preference data at ")
    message = refused(write(tmp_path / "a.jsonl", [{"question": "Hello", "chosen": "Hi"}]))
    assert "found columns 'question', 'chosen'" in message
    assert "dialogue strings" in message
    assert "no configurations, found 'default'" in refused(
        write(tmp_path / "b.jsonl", [plain_row(0)]), config="default"
    )
    (tmp_path / "c.csv").write_text("chosen,rejected")
    assert "found c.csv" in refused(tmp_path / "c.csv")
    (tmp_path / "d.jsonl").write_text('{"chosen": \n no json')
    assert "not readable as one table" in refused(tmp_path / "d.jsonl")
    (tmp_path / "e.jsonl").touch()
    assert "found e.jsonl empty" in refused(tmp_path / "e.jsonl")
    for number, text in enumerate(("null\n", ' null, {"chosen": "a"}\n', "\ufeffnull", '[{"chosen": "a"}, null]')):
        (tmp_path / f"{number}.json").write_text(text)  # Arrow's reader would end the process
        assert "null in place of row" in refused(tmp_path / f"{number}.json")
    (tmp_path / "folder").mkdir()
    assert "found no Parquet, JSON or JSONL file" in refused(tmp_path / "folder")
