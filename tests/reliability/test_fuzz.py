"""Readers of what a user or a stranger wrote: whatever it is, they raise what they say, in time, or read it rightly."""

import copy
import json
import math
import random
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from chats import BARE, FORMATS, answer, example, user
from forged import MANIFEST_NAME, change_json, forge, sound_files, write_files
from fpo.cache.manifest import Manifest
from fpo.cache.shard import DAMAGE, read_footer, read_table
from fpo.pipeline.config_files import COMMANDS, load_config, to_yaml
from fpo.stages.data.chat import GEMMA_TURNS, ChatFormat
from fpo.stages.data.conversations import load_conversations
from fpo.stages.data.preferences import load_preferences
from fpo.stages.data.tokenize import Limits, tokenize_pair
from fpo.stages.train.methods import METHODS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from judge import judge
from tiny_tokenizers import CHATML, chatml

LIMITS = Limits(max_length=64, max_prompt_length=32)
SECONDS = 20  # of one try; most take some milliseconds

atoms = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
values = st.recursive(atoms, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner))
chance = st.randoms(use_true_random=False)


@contextmanager
def in_time() -> Iterator[None]:
    def stop(signum: int, frame: FrameType | None) -> None:
        raise AssertionError(f"a try took longer than {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture
def fuzz(tries, tally) -> Callable[..., None]:
    """Tries a check on values of a strategy; the short version tries the same each time."""

    def run(what: str, few: int, many: int, strategy: st.SearchStrategy[Any], check: Callable[[Any], None]) -> None:
        @settings(
            max_examples=tries(few, many),
            derandomize=not tries(0, 1),
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(strategy)
        def one(value: Any) -> None:
            with in_time():
                check(value)
            tally(what)

        one()

    return run


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory, monkeypatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("hf"))


# Data sets.

TURNS = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "Paris."}]
ROWS: list[dict[str, Any]] = [
    {"chosen": TURNS, "rejected": [*TURNS[:1], {"role": "assistant", "content": "Lyon."}], "score_chosen": 8.0},
    {"prompt": "What is it?", "chosen": "Paris.", "rejected": "Lyon.", "score_rejected": 1},
    {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
    {"messages": TURNS},
]
rows = st.dictionaries(st.sampled_from(["chosen", "rejected", "prompt", "messages", "score_chosen", "a"]), values)


@st.composite
def data_files(draw) -> tuple[str, bytes]:
    """A file's ending and content: rows of any shape, some changed, or bytes."""
    rng = draw(chance)
    kind = rng.choice([*["jsonl"] * 5, *["json"] * 2, *["parquet"] * 4, "csv", "jsonl.gz"])
    made = [rng.choice(ROWS) for _ in range(rng.randrange(1, 5))]
    if rng.random() < 0.5:
        made = made[:1] * len(made)
    changed: Any = [copy.deepcopy(row) for row in made]
    for _ in range(rng.randrange(3)):
        if changed:
            change_json(changed, rng)
    if rng.random() < 0.2:
        changed.append(draw(rows))
    content = _encoded(changed, kind)
    if rng.random() < 0.3:
        data = bytearray(content)
        for _ in range(rng.randrange(1, 9)):
            data[rng.randrange(len(data))] = rng.choice(b'{}[]",:nul0\x00\xff\n')
        content = bytes(data[: rng.randrange(len(data))] if rng.random() < 0.3 else data)
    return kind, content if rng.random() < 0.95 else draw(st.binary())


def _encoded(made: list[Any], kind: str) -> bytes:
    if kind == "parquet":
        sink = pa.BufferOutputStream()
        try:
            pq.write_table(pa.Table.from_pylist([row for row in made if isinstance(row, dict)]), sink)
            return bytes(sink.getvalue()) or b"PAR1"
        except (pa.ArrowException, TypeError, ValueError, OverflowError):  # rows that Arrow cannot hold
            pass
    text = json.dumps(made) if kind == "json" else "\n".join(map(json.dumps, made)) + "\n"
    return text.encode() + b" "


def test_preference_data_of_any_content_are_read_or_refused(tmp_path, fuzz):
    def check(file: tuple[str, bytes]) -> None:
        path = tmp_path / f"data.{file[0]}"
        path.write_bytes(file[1])
        try:
            preferences = load_preferences(str(path), split="train")
            assert len(preferences.content_hash) == 64
        except (ValueError, OSError):
            return
        for i in range(len(preferences)):
            scores = preferences.example(i).score_chosen, preferences.example(i).score_rejected
            assert all(score is None or math.isfinite(score) for score in scores)
            for chat in (FORMATS["chatml"], FORMATS["gemma"]):
                done = tokenize_pair(preferences.example(i), i, chat, LIMITS)
                assert (done.pair is None) != (done.skipped is None)
                assert done.pair is None or min(map(len, (done.pair.chosen_ids, done.pair.rejected_ids))) > 0

    fuzz("fuzzed data sets", 100, 1_200, data_files(), check)


def test_conversations_of_any_content_are_read_or_refused(tmp_path, fuzz):
    def check(file: tuple[str, bytes]) -> None:
        path = tmp_path / f"data.{file[0]}"
        path.write_bytes(file[1].replace(b"chosen", b"messages"))
        try:
            found = load_conversations(str(path), split="train", chat=FORMATS["chatml"], max_length=64)
        except (ValueError, OSError):
            return
        for i in range(len(found)):
            assert found[i].learnt.any() and len(found[i].ids) == len(found[i].learnt) <= 64

    fuzz("fuzzed data sets", 15, 300, data_files(), check)


# Configurations.

NAMES = sorted({name for config in COMMANDS.values() for name in config.model_fields})
FIELDS = st.sampled_from([*NAMES, "batch-size"])
SECTIONS = st.sampled_from([*COMMANDS])
plausible = st.integers(-1, 9) | st.floats(0, 2) | st.booleans() | st.lists(st.text(max_size=4), max_size=2) | values
fields = st.dictionaries(FIELDS | st.text(max_size=6), plausible, max_size=2)
documents = st.one_of(
    st.dictionaries(FIELDS, plausible, max_size=3),
    st.builds(
        lambda own, sections, methods: own | sections | {"methods": methods},
        fields,
        st.dictionaries(SECTIONS | st.text(max_size=6), fields | values),
        st.dictionaries(st.sampled_from([*METHODS]) | st.text(max_size=6), fields | values),
    ),
    st.dictionaries(st.text(max_size=6), values),
)
yaml_text = st.text("abc:-{}[]&*!|>?#'\"% \n\t0123.~<=ß", max_size=60) | st.sampled_from(
    [
        # Each list holds the one before nine times: no end, once it is written out.
        "lr: [&a0 [x], " + ", ".join(f"&a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 20)) + "]",
        "sae: [&a [x], *a]",
        "&a {sft: *a}",
        "? {a: b}\n: c\n",
        "lr: 1_000\nseed: 0o7\n",
        "sft: {<<: {lr: 1}}\n",
        "{" * 3000,
        "model: 2024-13-45",
    ]
)


@st.composite
def configurations(draw) -> tuple[bytes, dict[str, Any], str]:
    """A file, options and a command."""
    if draw(st.booleans()):
        content = yaml.safe_dump(draw(documents), allow_unicode=True).encode(errors="surrogatepass")
    else:
        content = draw(yaml_text.map(lambda text: text.encode()) | st.binary(max_size=40))
    options = st.dictionaries(st.sampled_from(NAMES), st.text(max_size=6) | values, max_size=3)
    return content, draw(options), draw(st.sampled_from([*COMMANDS]))


def test_configurations_of_any_content_are_read_or_refused(tmp_path, fuzz):
    def check(case: tuple[bytes, dict[str, Any], str]) -> None:
        content, options, name = case
        command = COMMANDS[name]
        options = {key: value for key, value in options.items() if key in command.model_fields}
        path = tmp_path / "any.yaml"
        path.write_bytes(content)
        try:
            config = load_config(command, str(path), options)
        except ValueError as error:
            assert str(path) in str(error) or str(error).startswith("--")
            assert len(str(error)) < 3000
            return
        (tmp_path / "again.yaml").write_text(to_yaml(config))
        assert load_config(command, str(tmp_path / "again.yaml"), {}) == config

    fuzz("fuzzed configurations", 200, 2_500, configurations(), check)


# Caches.


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> dict[str, bytes]:
    return sound_files(tmp_path_factory.mktemp("sound"))


def test_forged_caches_are_refused_or_sound(sound, tmp_path, fuzz, monkeypatch):
    monkeypatch.setenv("FPO_HOME", str(tmp_path / "home"))

    def check(rng: random.Random) -> None:
        forged = sound
        for _ in range(rng.randrange(4)):
            forged = forge(forged, rng)
        folder = tmp_path / "cache"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        write_files(forged, folder)
        assert judge(folder) or forged != sound
        shutil.rmtree(tmp_path / "home", ignore_errors=True)

    fuzz("fuzzed caches", 200, 3_000, chance, check)


def test_a_manifest_and_a_shard_of_any_bytes_raise_what_they_say(sound, fuzz):
    manifest = sound[MANIFEST_NAME]
    meaning = Manifest.parse(manifest, "here").meaning

    def check(case: tuple[random.Random, bytes]) -> None:
        rng, noise = case
        forged = forge(sound, rng)
        for name, data in (*forged.items(), ("noise", noise)):
            at = rng.randrange(len(data) + 1)
            spliced = data[:at] + noise + data[at + rng.randrange(9) :]
            if name == MANIFEST_NAME:
                with pytest.raises(ValueError, match=r"\Ahere: "):
                    Manifest.parse(spliced + b" ", "here")
                continue
            for read in (read_footer, lambda source: read_table(source, meaning)):
                with suppress(DAMAGE):
                    read(pa.BufferReader(spliced))

    fuzz("fuzzed caches", 100, 3_000, st.tuples(chance, st.binary(max_size=30)), check)


# Chat templates.

PIECES = ["{% for m in messages %}", "{% endfor %}", "{{ m.content }}", "{{ m['role'] }}", "{{ messages[0].content }}"]
PIECES += [
    "{% if add_generation_prompt %}",
    "{% endif %}",
    "{% if loop.last %}",
    "{% else %}",
    "{{ bos_token }}",
    "<|im_end|>",
]
PIECES += ["{{ m.content | trim }}", "{{ m.content.split('</a>')[-1] }}", "{{ raise_exception('no') }}", "{{ 1 / 0 }}"]
PIECES += [
    "{% set x = namespace(n=0) %}",
    "{{ x.n }}",
    "{% set m = messages[-1] %}",
    "{{ messages | tojson }}",
    "{{ x + 1 }}",
]
PIECES += [
    "{% generation %}",
    "{% endgeneration %}",
    "{{ m.content[::-1] }}",
    "{{ strftime_now('%Y') }}",
    "{{ tools[0] }}",
    "\n",
]
PIECES += [
    "{{ self }}",
    "{{ m.__class__.__mro__ }}",
    "{{ m.pop('content') }}",
    "{{ messages.append(1) }}",
    "{{ range(3) | list }}",
]


@st.composite
def templates(draw) -> str:
    rng = draw(chance)
    if rng.random() < 0.5:
        return "".join(draw(st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=12)))
    parts = re.split(r"(\{[{%].*?[%}]\})", rng.choice([CHATML, GEMMA_TURNS, BARE]))
    for _ in range(rng.randrange(3)):
        at = rng.randrange(len(parts))
        parts[at : at + rng.choice([0, 0, 0, 1, 2])] = [rng.choice([*PIECES, "}}", "%}", "'"])]
    return "".join(parts)


def test_chat_templates_of_any_content_are_used_or_refused(fuzz):
    several = user("Hello") + answer("Hi.") + user("Sure?")

    def check(template: str) -> None:
        try:
            chat = ChatFormat(chatml(), template)
            prompt, *responses = chat.prompt_and_responses(example(several))
            lessons, _ = chat.lessons(several + answer("Yes."))
        except ValueError:
            return
        assert all(len(ids) == len(learnt) for ids, learnt in lessons)
        assert [response.ids[-1] for response in responses] == [chat.end_id] * 2
        assert all(isinstance(token, int) for token in prompt)

    fuzz("fuzzed templates", 150, 4_000, templates(), check)
