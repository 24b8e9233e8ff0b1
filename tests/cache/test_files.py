import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from fpo.cache.files import atomic_file, canonical_json, remove_leftovers, sha256_file, user_folder, write_atomically
from hypothesis import given, settings
from hypothesis import strategies as st

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.text(), json_values, max_size=4))
def test_canonical_json_does_not_depend_on_order_and_loses_nothing(value: dict[str, object]):
    backwards = dict(reversed(value.items()))
    assert canonical_json(backwards) == canonical_json(value)
    assert json.loads(canonical_json(value)) == value


def test_canonical_json_is_this_text():
    # Fingerprints on hubs depend on it: a change here is a new format version.
    value = {"b": [1, 2.5, None, True], "a": "é\n", "c": {"y": 1e-7, "x": 0.1}}
    assert canonical_json(value) == '{"a":"é\\n","b":[1,2.5,null,true],"c":{"x":0.1,"y":1e-07}}'


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_canonical_json_refuses_what_json_cannot_say(number: float):
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json({"loss": number})


def test_user_folder_prefers_the_more_specific_variable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("FPO_HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert user_folder() == tmp_path / "home/.cache/fpo"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert user_folder() == tmp_path / "xdg/fpo"
    monkeypatch.setenv("FPO_HOME", str(tmp_path / "own"))
    assert user_folder() == tmp_path / "own"


def test_a_failed_write_leaves_the_old_file_and_nothing_else(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def fail(*_: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_sha256_of_a_known_text(tmp_path: Path):
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    assert sha256_file(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_only_leftovers_of_dead_writers_of_this_host_are_removed(tmp_path: Path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host, tail = socket.gethostname(), "0" * 32
    names = {
        "dead": f"x.parquet.tmp-{host}-{dead.pid}-{tail}",
        "alive": f"x.parquet.tmp-{host}-{os.getppid()}-{tail}",
        "this process": f"x.parquet.tmp-{host}-{os.getpid()}-{tail}",
        "elsewhere": f"x.parquet.tmp-another-{host}-{dead.pid}-{tail}",
        "not ours": f"x.tmp-{host}",
    }
    for name in names.values():
        (tmp_path / name).touch()
    with atomic_file(tmp_path / "being written"):
        (name,) = (path.name for path in tmp_path.glob("being written.tmp-*"))
        names["being written"] = name
        remove_leftovers(tmp_path)
        left = {path.name for path in tmp_path.iterdir()}
    # A container that is started again has the same host and the same process numbers: what is not open is left over.
    assert left == {name for key, name in names.items() if key not in ("dead", "this process")}
