"""Opens the rows of a data set: of local files, folders of files, a folder of `save_to_disk`, or the hub.

In: a name, a split, and columns to rename. Out: `RawRows`, each row a dict of JSON values, however it was stored. Rows
are written once into the cache of `datasets`, as one JSON text a row, and read from there.
"""

import json
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import datasets
import huggingface_hub
from huggingface_hub import constants, get_session

from ...cache.errors import UserError, reading
from ...cache.files import sha256_file
from . import row_files
from .row_files import READERS, Row, columns_of, kind_of, read_rows, stem_of, table_columns

# Seconds within which the hub must answer a probe.
PROBE_SECONDS = 2.0
HUB_ID = re.compile(r"(?:[\w.-]+/)?[\w.-]+", re.ASCII)

KINDS = "Parquet, JSON, JSONL, CSV or TSV"
FEATURES = datasets.Features({"row": datasets.Value("large_string")})
# A change of this code makes `datasets` write the rows again.
CODE = [sha256_file(Path(str(file))) for file in (__file__, row_files.__file__)]


@dataclass(frozen=True)
class RawRows:
    """Rows of one split, in order.

    Attributes:
        data: the rows as JSON text, in the column `row`.
        columns: the names of all columns after renaming, each with None, or its type if it cannot be read, such as an
            image or bytes; a row may lack columns.
    """

    data: datasets.Dataset
    columns: Mapping[str, str | None]

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> Row:
        return parse_row(self.data[i]["row"])


def parse_row(text: str) -> Row:
    """A row of `RawRows.data`."""
    row: Row = json.loads(text)
    return row


def load_rows(
    source: str,
    split: str,
    config: str | None = None,
    limit: int | None = None,
    what: str = "preference data",
    renames: Sequence[str] = (),
) -> RawRows:
    """Opens the rows of a split, whatever their columns.

    Args:
        source: a local file or folder, or else a hub id.
        split: the name of the split; a local file is the split, whatever its name.
        config: the hub data set's configuration; local data has none.
        limit: keep only the first so many rows.
        what: what the rows are, for messages.
        renames: each `NEW=OLD` renames column OLD to NEW.

    Raises:
        UserError: there is no such file, folder, hub data set, split or column; a file is damaged or of another kind;
            or a setting would be ignored.
    """
    if limit is not None and limit < 1:
        raise UserError(f"expected a limit of at least 1 row, found {limit}")
    new_names = _new_names(renames)
    path = Path(source).expanduser()
    if path.exists() and config is not None:
        raise UserError(f"{source} is local and has no configurations, found {config!r}; leave it out")
    if (path.is_dir() and (path / "dataset_dict.json").exists()) or (path / "state.json").exists():
        rows = _of_table(_saved(path, split, source), source, new_names)
    elif path.exists():
        rows = _of_files(_split_files(path, split) if path.is_dir() else [path], source, split, new_names)
    elif not may_be_hub_id(source) or kind_of(path) is not None:
        raise UserError(f"expected {what} at {source}, found no such file or folder")
    else:
        rows = _of_table(load_from_hub(source, split, config), source, new_names)
    return rows if limit is None else RawRows(rows.data.select(range(min(limit, len(rows)))), rows.columns)


# Columns.


def _new_names(renames: Sequence[str]) -> dict[str, str]:
    """The new name of each column to rename, by its old name."""
    found: dict[str, str] = {}
    for rename in renames:
        new, equals, old = (part.strip() for part in rename.partition("="))
        if not (new and equals and old):
            raise UserError(f"--map: expected NEW=OLD, as chosen=preferred, found {rename!r}")
        if old in found or new in found.values():
            raise UserError(f"--map: expected every column once, found {', '.join(renames)}")
        found[old] = new
    return found


def _renamed(columns: Mapping[str, str | None], new_names: Mapping[str, str], source: str) -> dict[str, str | None]:
    for old, new in new_names.items():
        if old not in columns:
            raise UserError(f"--map: {new}={old}: expected a column of {source}, found {', '.join(map(repr, columns))}")
        if new in columns and new not in new_names:
            raise UserError(f"--map: {new}={old}: {source} has a column {new!r} already; rename it too, as other={new}")
    return {new_names.get(name, name): kind for name, kind in columns.items()}


# Files.


def _of_files(files: list[Path], source: str, split: str, new_names: dict[str, str]) -> RawRows:
    kinds = {kind_of(file) for file in files}
    if len(kinds) > 1 or None in kinds:
        names = ", ".join(file.name for file in files)
        raise UserError(
            f"{source}: expected files of one kind among {', '.join(READERS)}, each perhaps with {row_files.GZIP}, for "
            f"split {split!r}, found {names}"
        )
    columns: dict[str, str | None] = {}
    for file in files:
        with reading(f"{file}: not readable as rows"):
            for name, unread in columns_of(file).items():
                columns[name] = columns.get(name) or unread
    columns = _renamed(columns, new_names, source)
    stamps = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    with reading(f"{source}: not readable as rows"):
        data = datasets.Dataset.from_generator(
            _texts_of_files,
            features=FEATURES,
            gen_kwargs={"stamps": tuple(stamps), "new_names": new_names, "code": tuple(CODE)},
        )
    return RawRows(data, columns)


def _texts_of_files(
    stamps: Sequence[tuple[str, int, int]], new_names: Mapping[str, str], code: Sequence[str]
) -> Iterator[Row]:
    """Rows as JSON text; `datasets` names its cache by the arguments, so all that the rows depend on is among them."""
    for file, _, _ in stamps:
        for row in read_rows(Path(file)):
            yield {"row": _text(row, new_names)}


def _text(row: Row, new_names: Mapping[str, str]) -> str:
    return json.dumps({new_names.get(name, name): value for name, value in row.items()}, ensure_ascii=False)


def _split_files(folder: Path, split: str) -> list[Path]:
    """The files of a split, sorted by name: those in its own sub-folder, else in `data/`, else in the folder."""
    found = sorted(f for f in folder.rglob("*") if kind_of(f) is not None and f.is_file())
    layouts: list[dict[str, list[Path]]] = [{}, {}, {}]
    for file in found:
        # Shards of one split differ in their number alone: `train_sft` and `train_prefs` are not one `train`.
        stem = re.sub(r"[-_]?\d+(-of-\d+)?$", "", stem_of(file))
        if file.parent == folder:
            layouts[2].setdefault(stem, []).append(file)
        elif file.parent == folder / "data":
            layouts[1].setdefault(stem, []).append(file)
        elif file.parent.parent == folder:
            layouts[0].setdefault(file.parent.name, []).append(file)
    for splits in layouts:
        if split in splits:
            return splits[split]
        named = [name for name in splits if name.startswith(split)]
        if splits is not layouts[0] and len(named) == 1:
            return splits[named[0]]
    names = sorted({name for splits in layouts for name in splits})
    there = f"the splits {', '.join(map(repr, names))}; give one of them with --split" if names else f"no {KINDS} file"
    raise UserError(f"{folder}: expected files of one split {split!r}, found {there}")


# Tables of `datasets`.


def _saved(folder: Path, split: str, source: str) -> datasets.Dataset:
    """A split of what `save_to_disk` wrote; a single data set is the split, whatever its name."""
    with reading(f"{source}: not readable as a data set that was saved to disk"):
        found = datasets.load_from_disk(str(folder))
    if isinstance(found, datasets.Dataset):
        return found
    if split not in found:
        names = ", ".join(map(repr, found))
        raise UserError(f"{source}: expected split {split!r}, found the splits {names}; give one of them with --split")
    return found[split]


def _of_table(table: datasets.Dataset, source: str, new_names: dict[str, str]) -> RawRows:
    if not len(table):
        raise UserError(f"{source}: expected rows, found none")
    unread = table_columns(table.features.arrow_schema)
    columns = _renamed(unread, new_names, source)
    table = table.with_format(None).select_columns([name for name, kind in unread.items() if kind is None])
    with reading(f"{source}: not readable as rows"):
        data = datasets.Dataset.from_generator(
            _texts_of_table,
            features=FEATURES,
            gen_kwargs={"table": table, "name": table._fingerprint, "new_names": new_names, "code": tuple(CODE)},
        )
    return RawRows(data, columns)


def _texts_of_table(
    table: datasets.Dataset, name: str, new_names: Mapping[str, str], code: Sequence[str]
) -> Iterator[Row]:
    for row in table:
        yield {"row": _text(row, new_names)}


# The hub.


def may_be_hub_id(name: str) -> bool:
    """Whether a name can be the id of a data set on the hub: `owner/name`, or an old id without an owner."""
    return len(name) <= 96 and HUB_ID.fullmatch(name) is not None and not name.startswith((".", "-", "~"))


def load_from_hub(name: str, split: str, config: str | None) -> datasets.Dataset:
    """A split of a data set on the hub, or of its local copy if the hub cannot be reached.

    Raises:
        UserError: there is no such data set, split or configuration, or neither the hub nor a local copy.
    """
    fault = unreachable()
    try:
        with _offline() if fault else nullcontext():
            return datasets.load_dataset(name, config, split=split)
    except FileNotFoundError as error:
        raise UserError(f"found no local file or folder and no hub data set {name!r}") from error
    except ConnectionError as error:
        raise UserError(
            f"found no local file or folder {name!r}, and no data set of that name could be fetched from the hub "
            f"({fault or error}); correct the path, or check the network"
        ) from error
    except ValueError as error:  # the library's message about an unknown split or configuration, on one line
        raise UserError(f"hub data set {name!r}: {' '.join(str(error).split())}") from error


def unreachable() -> str | None:
    """Why the hub cannot be reached, found within `PROBE_SECONDS`; None if it gives any answer."""
    if huggingface_hub.is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    faults: list[str | None] = []

    def ask() -> None:
        try:
            get_session().head(constants.ENDPOINT, timeout=PROBE_SECONDS)
        except Exception as error:  # noqa: BLE001 (what the hub's client raises without a network has no public class)
            faults.append(f"{constants.ENDPOINT} does not answer: {' '.join(str(error).split())[:80]}")
        else:
            faults.append(None)

    # Looking up a host's name has no time limit, so a daemon thread asks, and may be left behind.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    return faults[0] if faults else f"{constants.ENDPOINT} did not answer within {PROBE_SECONDS:g} s"


@contextmanager
def _offline() -> Iterator[None]:
    """Makes the libraries use their local copies alone; without a network they would retry for half a minute."""
    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before
