import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fpo.stages.data import row_files
from fpo.stages.data.raw_rows import RawRows, load_rows
from hypothesis import given
from hypothesis import strategies as st
from pairs import few_examples

Rows = list[dict[str, Any]]


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("hf"))


def write(path: Path, rows: Rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text(json.dumps(rows, indent=2))
    return path


def load(path: Path, split: str = "train", **options: Any) -> RawRows:
    return load_rows(str(path), split, **options)


def rows_of(path: Path, split: str = "train", **options: Any) -> Rows:
    found = load(path, split, **options)
    return [found[i] for i in range(len(found))]


def refused(path: Path, split: str = "train", **options: Any) -> str:
    with pytest.raises((ValueError, OSError), match=r"\A[^\n]+\Z") as caught:
        rows_of(path, split, **options)
    return f"{caught.type.__name__}: {caught.value}"


# Values.

# Text that readers take for something else: dates, numbers, nothing, lists.
odd = st.sampled_from(
    ["2024-01-01", "2024-01-01 10:00:00", "42", "NaN", "null", "", " ", "[1]", "true", "\u2028", "a\x85b"]
)
texts = odd | st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
objects = st.lists(st.dictionaries(texts, values, min_size=1, max_size=3), min_size=1, max_size=4)


@few_examples
@given(rows=objects, array=st.booleans())
def test_json_is_read_as_it_is(tmp_path_factory, rows, array):
    text = json.dumps(rows, ensure_ascii=False) if array else "".join(json.dumps(row) + "\n\n" for row in rows)
    path = tmp_path_factory.mktemp("json") / "a.jsonl"
    path.write_text(text, encoding="utf-8", newline="")
    assert rows_of(path) == rows


@few_examples
@given(rows=st.lists(st.tuples(texts, texts), min_size=1, max_size=4), tab=st.booleans(), mark=st.booleans())
def test_a_table_is_read_as_text_with_its_quotes_and_line_breaks(tmp_path_factory, rows, tab, mark):
    written = io.StringIO(newline="")
    writer = csv.writer(written, delimiter="\t" if tab else ",")
    writer.writerows([("chosen", "no"), *rows])
    path = tmp_path_factory.mktemp("table") / ("a.tsv" if tab else "a.csv")
    path.write_bytes(written.getvalue().encode("utf-8-sig" if mark else "utf-8"))
    # A lone carriage return is a line break to readers outside quotes, and the writer quotes every one.
    assert rows_of(path) == [{"chosen": a, "no": b} for a, b in rows]


def test_shards_may_differ_in_types_and_in_columns(tmp_path: Path) -> None:
    write(tmp_path / "train-0.parquet", [{"chosen": "a", "score_chosen": 1, "id": 7}])
    write(tmp_path / "train-1.parquet", [{"score_chosen": 2.5, "chosen": [{"role": "user", "content": "b"}]}])
    write(tmp_path / "train-2.parquet", [{"chosen": None, "system": "c", "id": "x"}])
    assert rows_of(tmp_path) == [
        {"chosen": "a", "score_chosen": 1, "id": 7},
        {"chosen": [{"role": "user", "content": "b"}], "score_chosen": 2.5},
        {"chosen": None, "system": "c", "id": "x"},
    ]
    assert list(load(tmp_path).columns) == ["chosen", "score_chosen", "id", "system"]


def test_what_is_no_text_is_left_out_and_named(tmp_path: Path) -> None:
    columns = {"chosen": ["a"], "image": [b"\x89PNG"], "at": [0], "parts": [[{"bytes": b"a"}]]}
    table = pa.table(columns).cast(
        pa.schema(
            [
                ("chosen", pa.dictionary(pa.int32(), pa.string())),
                ("image", pa.binary()),
                ("at", pa.timestamp("s")),
                ("parts", pa.list_(pa.struct([("bytes", pa.binary())]))),
            ]
        )
    )
    pq.write_table(table, tmp_path / "a.parquet")
    assert rows_of(tmp_path / "a.parquet") == [{"chosen": "a"}]
    assert [name for name, kind in load(tmp_path / "a.parquet").columns.items() if kind] == ["image", "at", "parts"]


def test_another_file_of_that_name_is_read_anew(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"a": 1}])
    assert rows_of(path) == [{"a": 1}]
    write(path, [{"a": 12}, {"b": 3}])
    assert rows_of(path) == [{"a": 12}, {"b": 3}]


# Packed files.


def test_a_packed_file_is_measured_before_it_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_files, "SMALLEST_LIMIT", 1 << 12)
    line = json.dumps({"chosen": "a" * 100}).encode() + b"\n"
    for lines, fits in ((35, True), (36, False)):
        path = tmp_path / f"{lines}.jsonl.gz"
        path.write_bytes(gzip.compress(line * lines))
        assert len(line) * 35 < 1 << 12 < len(line) * 36
        if fits:
            assert len(load(path)) == lines
        else:
            assert "expected at most 4096 bytes once it is unpacked, found more" in refused(path)


def test_a_packing_has_to_be_what_the_name_says(tmp_path: Path) -> None:
    line = b'{"chosen": "a"}\n'
    for name, content, part in (
        ("a.jsonl", gzip.compress(line), "found gzip; name it a.jsonl.gz"),
        ("b.jsonl", b"PK\x03\x04" + line, "found zip; unpack it"),
        ("c.jsonl.gz", line, "found another format; rename it"),
        ("d.jsonl.gz", b"\x28\xb5\x2f\xfd", "found zstd; unpack it"),
        ("e.jsonl.gz", gzip.compress(line * 99)[:-9], "not readable"),
        ("f.jsonl.gz", b"", "rename it"),
    ):
        (tmp_path / name).write_bytes(content)
        assert part in refused(tmp_path / name)


# Folders.


@pytest.mark.parametrize(
    "names",
    [
        ("train.parquet",),
        ("train_prefs.jsonl",),
        ("train/a.parquet", "train/b.parquet"),
        ("data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"),
        ("train-1.jsonl", "train-2.jsonl"),
        ("data/train.csv",),
    ],
)
def test_a_folder_gives_the_files_of_its_split_in_order(tmp_path: Path, names: tuple[str, ...]) -> None:
    for number, name in enumerate(names):
        write(tmp_path / name, [{"number": number}])
        write(tmp_path / name.replace("train", "test"), [{"number": 9}])
    assert rows_of(tmp_path) == [
        {"number": str(number) if names[0].endswith("csv") else number} for number in range(len(names))
    ]


def test_a_folder_does_not_mix_splits(tmp_path: Path) -> None:
    for name in ("train_sft", "train_prefs", "test"):
        write(tmp_path / f"{name}.jsonl", [{"number": 0}])
    for split in ("train", "validation"):  # the first fits two, the second none
        assert f"'{split}', found the splits 'test', 'train_prefs', 'train_sft';" in refused(tmp_path, split)
    write(tmp_path / "train.jsonl", [{"number": 1}])
    assert rows_of(tmp_path) == [{"number": 1}]
    write(tmp_path / "train.parquet", [{"number": 1}])
    assert "of one kind" in refused(tmp_path) and "found train.jsonl, train.parquet" in refused(tmp_path)


def test_a_folder_of_another_split_is_answered_with_the_splits_that_it_has(tmp_path: Path) -> None:
    write(tmp_path / "data" / "train-00000-of-00002.csv", [{"a": 1}])
    write(tmp_path / "data" / "train-00001-of-00002.csv", [{"a": 1}])
    write(tmp_path / "test" / "one.jsonl", [{"a": 1}])
    write(tmp_path / "dataset_infos.json", [{"a": 1}])
    assert "found the splits 'test', 'train'; give one of them with --split" in refused(tmp_path, "train_prefs")
    assert len(rows_of(tmp_path)) == 2


def test_what_save_to_disk_wrote_is_read(tmp_path: Path) -> None:
    rows = [{"chosen": "a", "n": 1}, {"chosen": "b", "n": 2}]
    one = datasets.Dataset.from_list(rows)
    one.with_format("numpy").save_to_disk(tmp_path / "one")
    assert rows_of(tmp_path / "one", "any") == rows
    datasets.DatasetDict({"train": one, "test": one.select([1])}).save_to_disk(tmp_path / "splits")
    assert rows_of(tmp_path / "splits", "test") == rows[1:]
    assert "found the splits 'train', 'test'" in refused(tmp_path / "splits", "train_prefs")
    next((tmp_path / "splits" / "train").glob("*.arrow")).write_bytes(b"no table")
    assert "not readable as a data set that was saved to disk" in refused(tmp_path / "splits")


# Names of columns.


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.csv", "saved"])
def test_columns_are_renamed_however_they_are_stored(tmp_path: Path, name: str) -> None:
    rows = [{"yes": "a", "chosen": "b", "c": "d"}]
    if name == "saved":
        datasets.Dataset.from_list(rows).save_to_disk(tmp_path / name)
    else:
        write(tmp_path / name, rows)
    found = load(tmp_path / name, renames=["chosen=yes", "no = chosen"])
    assert found[0] == {"chosen": "a", "no": "b", "c": "d"}
    assert list(found.columns) == ["chosen", "no", "c"]
    assert rows_of(tmp_path / name) == rows


@pytest.mark.parametrize(
    ("renames", "part"),
    [
        (["chosen"], "expected NEW=OLD, as chosen=preferred, found 'chosen'"),
        (["=a"], "expected NEW=OLD"),
        (["b=c"], "expected a column of"),
        (["b=a"], "has a column 'b' already"),
        (["c=a", "d=a"], "expected every column once"),
        (["c=a", "c=b"], "expected every column once"),
    ],
)
def test_a_renaming_that_cannot_be_is_refused(tmp_path: Path, renames: list[str], part: str) -> None:
    assert part in refused(write(tmp_path / "a.jsonl", [{"a": 1, "b": 2}]), renames=renames)


# Mistakes.


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("", "found none"),
        ("\n\n", "found none"),
        ("[]", "found none"),
        ("null\n", "line 1: expected a JSON object, found null"),
        ('{"a": 1}\n null', "line 2: expected a JSON object, found null"),
        ("\ufeffnull", "line 1: expected a JSON object, found null"),
        ('[{"a": 1}, null]', "row 1: expected a JSON object, found null"),
        ("[1]", "row 0: expected a JSON object, found int"),
        ('{"a": 1}\n{"a": \n', "line 2, column 7: expected JSON, found none"),
        ('{"a": 1, "a": 2}', "line 1: expected JSON, found the key 'a' twice"),
        ('{"a": "\\ud800"}', "line 1: expected JSON, found 'utf-8' codec can't encode"),
        ('{"a": ' + "[" * 100_000, "line 1: expected JSON, found it nested too deep"),
    ],
)
def test_what_is_no_row_is_refused_with_its_number(tmp_path: Path, content: str, part: str) -> None:
    (tmp_path / "a.jsonl").write_text(content, encoding="utf-8")
    assert part in refused(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "found none"),
        (b"a,b\n", "found none"),
        (b"a,b\n1,2\n1\n", "row 1: expected 2 values, as in the header, found 1"),
        (b"a,b\n1,2,3\n", "row 0: expected 2 values, as in the header, found 3"),
        (b"a,a\n1,2\n", "expected every column once"),
        (b'a,b\n1,"2\n', "line 2: "),
        (b"a,b\n1,\xff\n", "expected UTF-8"),
    ],
)
def test_what_is_no_table_is_refused_with_its_line(tmp_path: Path, content: bytes, part: str) -> None:
    (tmp_path / "a.csv").write_bytes(content)
    assert part in refused(tmp_path / "a.csv")


def test_mistakes_in_the_source_are_one_line(tmp_path: Path) -> None:
    assert refused(tmp_path / "nothing.jsonl").startswith("UserError: expected preference data at ")
    path = write(tmp_path / "a.jsonl", [{"a": 1}])
    assert "no configurations, found 'default'" in refused(path, config="default")
    assert "at least 1 row, found 0" in refused(path, limit=0)
    (tmp_path / "c.txt").write_text("chosen,rejected")
    assert "found c.txt" in refused(tmp_path / "c.txt")
    (tmp_path / "folder").mkdir()
    assert "found no Parquet, JSON, JSONL, CSV or TSV file" in refused(tmp_path / "folder")
