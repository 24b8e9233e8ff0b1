"""What is wrong with a shard: its bytes, what it says about itself, its rows.

In: a shard's file, and what a manifest or the shard's own footer says of it. Out: the first fault, or none.
"""

from collections.abc import Iterator
from pathlib import Path

from .files import sha256_file
from .manifest import Manifest, ShardRecord, differences
from .shard import DAMAGE, Footer, check_range, read_footer, read_table


def shard_fault(path: Path, manifest: Manifest, record: ShardRecord) -> str | None:
    """What is wrong with a shard that a manifest vouches for, every byte and row of it read; None if nothing is."""
    fault = file_fault(path, manifest, record, hashes=True)
    if fault is None:  # a file with the wrong bytes is not parsed any further
        try:
            check_range(read_table(path, manifest.meaning), record.report)
        except DAMAGE as error:
            fault = str(error)
    return fault


def file_fault(path: Path, manifest: Manifest, record: ShardRecord, hashes: bool) -> str | None:
    """What is wrong with a shard's size, footer and, if asked, SHA-256; None if nothing is. No row is read.

    Raises:
        PermissionError: it may not be read, which says nothing of what is in it.
    """
    return next(_file_faults(path, manifest, record, hashes), None)


def _file_faults(path: Path, manifest: Manifest, record: ShardRecord, hashes: bool) -> Iterator[str]:
    try:
        size = path.stat().st_size
        if size != record.bytes:
            yield f"expected {record.bytes} bytes, found {size}"
        if hashes and (sha256 := sha256_file(path)) != record.sha256:
            yield f"expected SHA-256 {record.sha256}, found {sha256}"
        footer = read_footer(path)
    except FileNotFoundError:
        yield "missing"
        return
    except PermissionError:
        raise
    except DAMAGE as error:
        yield f"unreadable ({error})"
        return
    found = differences(manifest.meaning, footer.meaning) + differences(manifest.numerics, footer.numerics)
    if found:
        yield f"of another spec ({'; '.join(found)})"
    if footer.rows != record.rows:
        yield f"expected {record.rows} rows, found {footer.rows}"
    if footer.report != record.report:
        yield "its report is not the one in the manifest"


def read_back(path: Path) -> Footer:
    """Reads a shard whole and checks it against its own footer, as long as no manifest vouches for it.

    Raises:
        One of `DAMAGE`: the file is missing or damaged, or a row breaks a rule.
    """
    footer = read_footer(path)
    check_range(read_table(path, footer.meaning), footer.report)
    return footer
