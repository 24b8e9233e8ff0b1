"""YAML from a stranger: plain data, or refused in one line, however much it would unfold to."""

import pytest
from fpo.pipeline.plain_yaml import read_yaml, write_yaml
from hypothesis import given
from hypothesis import strategies as st

atoms = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
names = st.from_regex(r"[a-z_]+", fullmatch=True)
plain = st.recursive(
    atoms,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
)


@given(st.dictionaries(names, plain))
def test_plain_data_are_read_as_written(value):
    assert read_yaml(write_yaml({**value, "again": value}).encode()) == {**value, "again": value}


@pytest.mark.parametrize(
    "text, found",
    [
        ("a: &a [1]\nb: *a\n", "'*a' stands for"),
        ("&a {for: *a}", "'*a' stands for"),
        ("a: {<<: &b {c: 1}}\nd: {<<: *b}", "'*b' stands for"),
        (
            "x: [" + ", ".join(f"&a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 20)) + "]",
            "'*a0' stands for",
        ),
        ("a: !!python/object/apply:os.system ['true']", "python/object/apply:os.system' says"),
        ("!!python/name:os.system a: 1", "python/name:os.system' says"),
        ("a: !!binary aGk=", "binary' says"),
        ("a: !local 1", "'!local' says"),
        ("a: ! 1", "'!' says"),
        ("batch-size: 1\nbatch_size: 2\n", "'batch_size' stands twice"),
        ("a: 1\n--- \na: 2\n", "single document"),
        ("[" * 3000, "recursion"),
        ("a: 2024-13-45", "month"),
    ],
)
def test_what_is_not_plain_is_refused_in_one_line(text, found):
    with pytest.raises(ValueError, match=r"\Aexpected plain YAML, found: [^\n]+\Z") as caught:
        read_yaml(text.encode())
    assert found in str(caught.value)
