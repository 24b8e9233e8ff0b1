"""YAML from a stranger: plain data, or refused in one line, however much it would unfold to."""

import pytest
from fpo.pipeline.config_files import read_yaml, write_yaml
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
    assert read_yaml(write_yaml({**value, "again": value}).encode(), "here") == {**value, "again": value}


@pytest.mark.parametrize(
    "text, found",
    [
        ("a: &a [1]\nb: *a\n", "'*a'"),
        ("&a {sft: *a}", "'*a'"),
        ("a: {<<: &b {c: 1}}\nd: {<<: *b}", "'*b'"),
        (
            "x: [" + ", ".join(f"&a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 20)) + "]",
            "'*a0'",
        ),
        ("a: !!python/object/apply:os.system ['true']", "python/object/apply:os.system'"),
        ("!!python/name:os.system a: 1", "python/name:os.system'"),
        ("a: !!binary aGk=", "binary'"),
        ("a: !local 1", "'!local'"),
        ("a: ! 1", "'!'"),
        ("batch-size: 1\nbatch_size: 2\n", "'batch_size' stands twice"),
        ("a: 1\n--- \na: 2\n", "single document"),
        ("[" * 3000, "recursion"),
        ("a: 2024-13-45", "month"),
    ],
)
def test_what_is_not_plain_is_refused_in_one_line(text, found):
    with pytest.raises(ValueError, match=r"\Ahere: expected plain YAML, found: [^\n]+\Z") as caught:
        read_yaml(text.encode(), "here")
    assert found in str(caught.value)
