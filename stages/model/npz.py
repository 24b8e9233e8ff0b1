"""The arrays of an `.npz` file, which may be a stranger's: no pickle, and no more memory than the file's size allows.

In: a path. Out: arrays by name.
"""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...cache.errors import reading

# What the arrays may unpack to: so much, or so many times the file's bytes if that is more. `np.savez` does not
# compress, and weights hardly can be.
SMALLEST_LIMIT = 1 << 26
TIMES_BYTES = 4
# Of these zipfile unpacks no more at a time than it is asked for.
COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


def read_npz(path: Path) -> dict[str, npt.NDArray[Any]]:
    """Reads all arrays.

    Raises:
        OSError: there is no such file.
        ValueError: it is no npz file of plain arrays, or unpacks to more than is allowed.
    """
    with path.open("rb") as raw, reading(f"expected an npz file of plain arrays, {path} is not one"):
        _check_sizes(raw, path.stat().st_size)
        raw.seek(0)
        with np.load(raw, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    return arrays


def _check_sizes(raw: Any, size: int) -> None:
    limit = max(SMALLEST_LIMIT, TIMES_BYTES * size)
    with zipfile.ZipFile(raw) as archive:
        members = archive.infolist()
    if any(member.compress_type not in COMPRESSIONS for member in members):
        raise ValueError("expected arrays as np.savez writes them, found another compression")
    if (total := sum(member.file_size for member in members)) > limit:
        raise ValueError(f"expected arrays of at most {limit} bytes, found {total} in a file of {size} bytes")
