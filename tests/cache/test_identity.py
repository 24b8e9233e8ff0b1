import dataclasses

import pytest
from cache_rows import MEANING, NUMERICS, SITES
from fpo.cache.identity import Meaning, Numerics, SiteMeaning, differences

OTHER_MEANING = {
    "format_version": 3,
    "model": "aa" * 32,
    "tokenizer": "bb" * 32,
    "chat_template": MEANING.chat_template + " ",
    "date": "2026-11-27",
    "sites": SITES[::-1],
    "recipe": "bf16",
    "pooling": "max",
    "keep_features": None,
    "max_length": 65,
    "max_prompt_length": 33,
    "truncation": "keep_end",
    "skip_rules": ("empty",),
    "drop_ties": True,
    "turns": "last",
    "dataset": "cc" * 32,
    "split": "test",
    "limit": 10,
    "order": "shuffled",
}
OTHER_SITE = {"site": "blocks.1.hook_mlp_out", "sae": "dd" * 32, "width": 128, "architecture": "relu"}
OTHER_NUMERICS = {
    "attention": "eager",
    "token_budget": 512,
    "shard_size": 5,
    "device": "cuda",
    "threads": 3,
    "versions": {"torch": "2.9"},
}


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Meaning)])
def test_every_field_of_the_meaning_moves_the_fingerprint(field: str):
    # A new field fails here until it has another value above.
    other = dataclasses.replace(MEANING, **{field: OTHER_MEANING[field]})
    assert other.fingerprint() != MEANING.fingerprint()
    assert all(line.startswith(field) for line in differences(MEANING, other))
    assert differences(MEANING, other)


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(SiteMeaning)])
def test_every_field_of_a_site_moves_the_fingerprint(field: str):
    site = dataclasses.replace(SITES[0], **{field: OTHER_SITE[field]})
    other = dataclasses.replace(MEANING, sites=(site, SITES[1]))
    assert other.fingerprint() != MEANING.fingerprint()
    assert [line.split(":")[0] for line in differences(MEANING, other)] == [f"sites[0].{field}"]


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Numerics)])
def test_every_field_of_the_numerics_is_named_when_it_differs(field: str):
    found = differences(NUMERICS, dataclasses.replace(NUMERICS, **{field: OTHER_NUMERICS[field]}))
    assert len(found) == 1
    assert found[0].startswith(field)


def test_equal_identities_have_equal_fingerprints_and_no_differences():
    copy = dataclasses.replace(MEANING)
    assert copy.fingerprint() == MEANING.fingerprint()
    assert differences(MEANING, copy) == []


def test_differences_are_one_line_each_with_both_values():
    other = dataclasses.replace(MEANING, max_length=256, sites=SITES[:1])
    assert differences(MEANING, other) == [
        "sites[1].site: expected 'blocks.2.hook_mlp_out', found nothing",
        f"sites[1].sae: expected '{SITES[1].sae}', found nothing",
        "sites[1].width: expected 70000, found nothing",
        "sites[1].architecture: expected 'relu', found nothing",
        "max_length: expected 64, found 256",
    ]
    assert differences(NUMERICS, dataclasses.replace(NUMERICS, versions={"torch": "2.9"})) == [
        "versions.pyarrow: expected '26', found nothing"
    ]


def test_long_values_are_shortened_and_still_told_apart():
    left, right = (dataclasses.replace(MEANING, chat_template="x\n" * 500 + end) for end in "ab")
    (line,) = differences(left, right)
    assert len(line) < 250 and "\n" not in line
    expected, found = line.removeprefix("chat_template: expected ").split(", found ")
    assert expected != found
