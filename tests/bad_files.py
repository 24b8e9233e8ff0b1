"""Malformed files of every kind that the program reads.

In: the tiny world. Out: files and folders that are wrong in one thing each, by the name that says in which.
"""

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fpo.cache.files import canonical_json, sha256_text
from fpo.cache.manifest import MANIFEST_NAME
from fpo.stages.model.sae import Site
from pairs import calm_gemma2
from safetensors.numpy import load_file, save_file
from tiny import save_tiny_sae
from tiny_profile import tiny_profile
from tiny_world import SITES, World, ran, rows, write_rows
from transformers import BloomConfig, BloomForCausalLM

Edit = Callable[[Path], Any]

WEIGHTS = "model.safetensors"
SAE_WEIGHTS = "sae_weights.safetensors"


def lines(*made: Any) -> bytes:
    """JSON lines."""
    return "".join(json.dumps(row) + "\n" for row in made).encode()


def said(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def pair(**changes: Any) -> dict[str, Any]:
    """A preference row with some columns of another content."""
    return rows(0, 1)[0] | changes


def parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return bytes(sink.getvalue())


TWO_CHOSEN = pa.Table.from_arrays([pa.array(["a"])] * 3, names=["chosen", "chosen", "rejected"])

# Preference data, for `fpo precompute`.
DATA: dict[str, bytes] = {
    "other columns.jsonl": lines({"question": "a", "answer": "b"}),
    "numbers for answers.jsonl": lines({"chosen": 1, "rejected": 2}),
    "no JSON.jsonl": b"no json\n",
    "empty.jsonl": b"",
    "blank lines.jsonl": b"\n\n",
    "another kind.txt": lines(*rows(0, 2)),
    "other columns.csv": b"question,answer\na,b\n",
    "a row too long.csv": b"prompt,chosen,rejected\na,b,c\na,b,c,d\n",
    "an open quote.csv": b'prompt,chosen,rejected\na,b,"c\n',
    "semicolons.csv": b"prompt;chosen;rejected\na;b;c\n",
    "no row.tsv": b"prompt\tchosen\trejected\n",
    "no UTF-8.jsonl": lines(pair()).replace(b"assistant", b"assist\xffnt"),
    "UTF-16.jsonl": lines(pair()).decode().encode("utf-16"),
    "an array of numbers.json": b"[1, 2, 3]",
    "an empty array.json": b"[]",
    "a number.json": b"1",
    "nulls for rows.jsonl": b"null\nnull\n",
    "cut in the middle.jsonl": lines(*rows(0, 3))[:-40],
    "one long line.jsonl": b'{"chosen": "' + b"a" * 3_000_000,
    "nested a thousand deep.jsonl": b'{"chosen": ' + b"[" * 1000 + b"]" * 1000 + b"}",
    "a list in a list.jsonl": lines(pair(chosen=[[said("user", "a")]])),
    "no role.jsonl": lines(pair(chosen=[{"content": "a"}])),
    "no content.jsonl": lines(pair(chosen=[{"role": "user"}])),
    "content that is a number.jsonl": lines(pair(chosen=[said("user", 3)])),
    "an image.jsonl": lines(pair(chosen=[said("user", [{"type": "image_url", "image_url": {"url": "a"}}])])),
    "images beside the text.jsonl": lines(pair(images=["a.png"])),
    "a system turn under another name.jsonl": lines(pair(system_prompt="Be brief.")),
    "a prompt under another name.jsonl": lines(
        {"ask": "How are you?", "chosen": "I am well.", "rejected": "I am not."}
    ),
    "other letters.jsonl": lines({"Prompt": "a", "Chosen": "b", "Rejected": "c"}),
    "a role that is a number.jsonl": lines(pair(chosen=[{"role": 1, "content": "a"}])),
    "text beside messages.jsonl": lines(pair(chosen="a")),
    "kinds that change.jsonl": lines({"chosen": "a", "rejected": "b"}, {"chosen": 1, "rejected": "b"}),
    "a score as text.jsonl": lines(pair(score_chosen="high")),
    "a score that is no number.jsonl": lines(pair(score_chosen=float("nan"))),
    "a score without end.jsonl": b'{"chosen": "a", "rejected": "b", "score_chosen": 1e999}\n',
    "half a character.jsonl": rb'{"chosen": "a\ud800", "rejected": "b", "prompt": "c"}' + b"\n",
    "a key twice.jsonl": b'{"chosen": "a", "chosen": "b", "rejected": "c", "prompt": "d"}\n',
    "zero bytes.jsonl": b"\0" * 100,
    "no Parquet.parquet": b"PAR1 and so on PAR1",
    "cut.parquet": parquet(TWO_CHOSEN)[:-9],
    "other columns.parquet": parquet(pa.table({"text": ["a"]})),
    "a column twice.parquet": parquet(TWO_CHOSEN),
    "bytes for text.parquet": parquet(pa.table({"chosen": [b"a"], "rejected": [b"b"]})),
    "no gzip.jsonl.gz": b"not compressed",
    "gzip.jsonl": gzip.compress(lines(pair())),
    "gzip that ends early.jsonl.gz": gzip.compress(lines(pair()))[:-9],
    "zeros under gzip.jsonl.gz": gzip.compress(bytes(1 << 27)),
    "no row.parquet": parquet(pa.table({"chosen": pa.array([], pa.string()), "rejected": pa.array([], pa.string())})),
}

# Conversations, for `fpo sft`.
CHATS: dict[str, bytes] = {
    "other columns.jsonl": lines(pair()),
    "text for messages.jsonl": lines({"messages": "Hello"}),
    "numbers for messages.jsonl": lines({"messages": [1, 2]}),
    "no content.jsonl": lines({"messages": [{"role": "user"}]}),
    "nobody answers.jsonl": lines({"messages": [said("user", "Hello")]}),
    "no conversation.jsonl": lines({"messages": []}),
    "no UTF-8.jsonl": b'{"messages": "\xff"}\n',
    "half a character.jsonl": rb'{"messages": [{"role": "user", "content": "a\ud800"}]}',
    "an unknown speaker.jsonl": lines({"conversations": [{"from": "narrator", "value": "Once."}]}),
    "a document beside the messages.jsonl": lines(
        {"messages": [said("user", "Hello"), said("assistant", "Yes.")], "document": "A text."}
    ),
}

TURNS = "{% for m in messages %}{{ m.role + ': ' + m.content }}\n{% endfor %}"

# Chat templates, for `fpo precompute`.
TEMPLATES: dict[str, bytes] = {
    "a syntax error.jinja": b"{% for m in messages %}{{ m.content }}",
    "an unknown filter.jinja": b"{{ messages | shout }}",
    "an unknown function.jinja": b"{{ shout(messages) }}",
    "one that raises.jinja": b"{{ raise_exception('not today') }}",
    "one that yields nothing.jinja": b"",
    "one that leaves out answers.jinja": b"{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
    "one that does not only append.jinja": b"{{ messages | length }} " + TURNS.encode(),
    "one that closes answers differently.jinja": TURNS.encode() + b"{{ messages[-1].content | length }}",
    "a sum of text and number.jinja": b"{{ 'a' + 1 }}",
    "a division by zero.jinja": b"{{ 1 / 0 }}",
    "a huge range.jinja": b"{% for i in range(1000000000) %}{{ i }}{% endfor %}",
    "endless recursion.jinja": b"{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "another file.jinja": b"{% include '/etc/passwd' %}",
    "no UTF-8.jinja": b"\xff\xfe{{ messages }}",
}

# Configurations, for `fpo config show`.
CONFIGURATIONS: dict[str, bytes] = {
    "empty.yaml": b"",
    "a list.yaml": b"- lr\n- beta\n",
    "text.yaml": b"lr",
    "an unknown key.yaml": b"learning_rate: 1\n",
    "a key twice.yaml": b"lr: 1\nlr: 2\n",
    "a key in both spellings.yaml": b"batch-size: 1\nbatch_size: 2\n",
    "a tab.yaml": b"sft:\n\tlr: 1\n",
    "an open bracket.yaml": b"sae: [a, b\n",
    "a number for text.yaml": b"model: 1\n",
    "text for a number.yaml": b"lr: fast\n",
    "a list for a number.yaml": b"lr: [1]\n",
    "below zero.yaml": b"batch_size: -1\n",
    "a share of a step.yaml": b"max_steps: 1.5\n",
    "infinite.yaml": b"lr: .inf\n",
    "no number.yaml": b"alpha: .nan\n",
    "an unknown choice.yaml": b"method: ipo\n",
    "text for a list.yaml": b"sae: blocks.1\n",
    "a list for a key.yaml": b"? [a, b]\n: 1\n",
    "a number for a key.yaml": b"1: 2\n",
    "nothing for a key.yaml": b": 2\n",
    "an object of Python.yaml": b"model: !!python/object/apply:os.getcwd []\n",
    "two documents.yaml": b"lr: 1\n---\nlr: 2\n",
    "an unknown anchor.yaml": b"lr: *rate\n",
    "itself.yaml": b"&a {sft: *a}\n",
    "nested a thousand deep.yaml": b"[" * 1000,
    "no UTF-8.yaml": b"model: \xff\xfe\n",
    "zero bytes.yaml": b"\0\0\0",
    "a date.yaml": b"model: 2024-01-01\n",
    "a date that is none.yaml": b"model: 2024-13-45\n",
    "a section that is a list.yaml": b"sft: [lr]\n",
    "a section of no command.yaml": b"traim: {lr: 1}\n",
    "a section that is a number.yaml": b"sft: 1\n",
    "an unknown key in a section.yaml": b"sft: {learning_rate: 1}\n",
    "a method in a method's section.yaml": b"methods: {dpo: {method: fpo}}\n",
    "a section of an earlier version.yaml": b"for: {sft: {lr: 1}}\n",
    "a method of another name.yaml": b"methods: {ipo: {beta: 1}}\n",
}

# Questions of a benchmark, for `fpo evaluate`.
QUESTIONS: dict[str, tuple[str, bytes]] = {
    "no JSON": ("alpaca-eval", b"no json"),
    "an object": ("alpaca-eval", b"{}"),
    "numbers": ("alpaca-eval", b"[1, 2]"),
    "none": ("alpaca-eval", b"[]"),
    "no instruction": ("alpaca-eval", b'[{"dataset": "a"}]'),
    "no UTF-8": ("alpaca-eval", b'["\xff"]'),
    "nested a hundred thousand deep": ("alpaca-eval", b"[" * 100_000),
    "an id twice": ("mt-bench", lines(*[{"question_id": 1, "category": "math", "turns": ["a"]}] * 2)),
    "turns as text": ("mt-bench", lines({"question_id": 1, "category": "math", "turns": "a"})),
    "half a character": ("mt-bench", rb'{"question_id": 1, "category": "math", "turns": ["\ud800"]}'),
    "no words": ("arena-hard", lines({"uid": "a", "prompt": " "})),
    "lists for rows": ("arena-hard", b"[]\n"),
}


def without(name: str) -> Edit:
    return lambda folder: (folder / name).unlink()


def holding(name: str, content: bytes) -> Edit:
    return lambda folder: (folder / name).write_bytes(content)


def halved(name: str) -> Edit:
    return lambda folder: (folder / name).write_bytes(
        (folder / name).read_bytes()[: (folder / name).stat().st_size // 2]
    )


def with_fields(name: str, **fields: Any) -> Edit:
    """Changes fields of a JSON object."""
    return lambda folder: (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | fields))


def with_metadata(**fields: Any) -> Edit:
    """Changes fields of an SAE's metadata."""
    return lambda folder: with_fields(
        "cfg.json", metadata=json.loads((folder / "cfg.json").read_text())["metadata"] | fields
    )(folder)


def with_arrays(name: str, change: Callable[[dict[str, Any]], Any]) -> Edit:
    """Changes arrays of a safetensors file; the change may be made in place or returned."""

    def edit(folder: Path) -> None:
        arrays = load_file(folder / name)
        save_file(change(arrays) or arrays, folder / name, metadata={"format": "pt"})

    return edit


def without_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def small_vocabulary(folder: Path) -> None:
    calm_gemma2(vocab_size=200).save_pretrained(folder)


def without_a_shard(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    model = calm_gemma2(vocab_size=340)
    model.save_pretrained(folder, max_shard_size="20KB")
    sorted(folder.glob("*.safetensors"))[1].unlink()


# Model folders, for `fpo precompute`.
MODELS: dict[str, Edit] = {
    "no config.json": without("config.json"),
    "config.json that is no JSON": holding("config.json", b"{"),
    "config.json that is a list": holding("config.json", b"[]"),
    "config.json that is empty": holding("config.json", b""),
    "config.json that is no UTF-8": holding("config.json", b"\xff{}"),
    "a kind of model that is unknown": with_fields("config.json", model_type="gemma99"),
    "a kind of model that is not causal": with_fields("config.json", model_type="t5"),
    "a size that is text": with_fields("config.json", hidden_size="large"),
    "a size below zero": with_fields("config.json", num_hidden_layers=-1),
    "other sizes than the weights'": with_fields("config.json", hidden_size=48),
    "more layers than the weights": with_fields("config.json", num_hidden_layers=5, layer_types=None),
    "no weights": without(WEIGHTS),
    "weights cut short": halved(WEIGHTS),
    "weights that are empty": holding(WEIGHTS, b""),
    "weights that are text": holding(WEIGHTS, b"no weights at all"),
    "a weight left out": with_arrays(WEIGHTS, lambda arrays: arrays.pop("model.norm.weight") is None),
    "a shard left out": without_a_shard,
    "fewer embeddings than tokens": small_vocabulary,
    "no tokenizer": without_tokenizer,
    "tokenizer.json that is no JSON": holding("tokenizer.json", b"{"),
    "tokenizer.json of another thing": holding("tokenizer.json", b"{}"),
    "tokenizer_config.json that is a list": holding("tokenizer_config.json", b"[]"),
    "a tokenizer without EOS": with_fields("tokenizer_config.json", eos_token=None),
}

# SAE folders, for `fpo precompute`.
SAES: dict[str, Edit] = {
    "no cfg.json": without("cfg.json"),
    "cfg.json that is no JSON": holding("cfg.json", b"{"),
    "cfg.json that is a list": holding("cfg.json", b"[]"),
    "cfg.json that is empty": holding("cfg.json", b"{}"),
    "cfg.json that is no UTF-8": holding("cfg.json", b"\xff"),
    "an unknown architecture": with_fields("cfg.json", architecture="psychic"),
    "an architecture that reads two activations": with_fields("cfg.json", architecture="transcoder"),
    "a width below zero": with_fields("cfg.json", d_sae=-64),
    "a width that is text": with_fields("cfg.json", d_sae="wide"),
    "another width than the weights'": with_fields("cfg.json", d_sae=65),
    "an unknown kind of number": with_fields("cfg.json", dtype="float7"),
    "a normalisation that is unknown": with_fields("cfg.json", normalize_activations="perhaps"),
    "metadata that are a list": with_fields("cfg.json", metadata=[1]),
    "a site that is a number": with_metadata(hook_name=7),
    "no weights": without(SAE_WEIGHTS),
    "weights that are text": holding(SAE_WEIGHTS, b"no weights at all"),
    "weights cut short": halved(SAE_WEIGHTS),
    "weights that are no numbers": with_arrays(SAE_WEIGHTS, lambda a: a["W_enc"].fill(np.nan)),
    "weights transposed": with_arrays(SAE_WEIGHTS, lambda a: a | {"W_enc": np.ascontiguousarray(a["W_enc"].T)}),
    "a weight left out": with_arrays(SAE_WEIGHTS, lambda a: a.pop("b_enc") is None),
}


def npz(**arrays: Any) -> Edit:
    return lambda path: np.savez(path, **arrays)


def _scope(d: int = 32, m: int = 64, **changes: Any) -> dict[str, Any]:
    shapes = {"W_enc": (d, m), "b_enc": (m,), "threshold": (m,), "W_dec": (m, d), "b_dec": (d,)}
    return {name: np.ones(shape, np.float32) for name, shape in shapes.items()} | changes


# Gemma Scope's files, for `fpo precompute`, with the site that is given for them.
SCOPES: dict[str, tuple[str, Edit]] = {
    "no site": ("", npz(**_scope())),
    "a site that is none": ("@layer 2", npz(**_scope())),
    "other arrays": ("@blocks.2.hook_resid_post", npz(a=np.ones(2))),
    "arrays of another kind of number": ("@blocks.2.hook_resid_post", npz(**_scope(b_dec=np.ones(32)))),
    "arrays that do not fit": ("@blocks.2.hook_resid_post", npz(**_scope(b_dec=np.ones(31, np.float32)))),
    "no npz": ("@blocks.2.hook_resid_post", lambda path: path.write_bytes(b"PK no archive")),
}


def manifest(**changes: Any) -> Edit:
    """Changes fields of a manifest's meaning and signs it again."""

    def edit(folder: Path) -> None:
        document = json.loads((folder / MANIFEST_NAME).read_text())
        del document["sha256"]
        document["meaning"] |= changes
        document["sha256"] = sha256_text(canonical_json(document))
        text = json.dumps(document, sort_keys=True, indent=2, ensure_ascii=False) + "\n"
        (folder / MANIFEST_NAME).write_text(text)

    return edit


def second_shard(change: Callable[[Path], Any]) -> Edit:
    return lambda folder: change(sorted((folder / "data").iterdir())[1])


# Folders of a cache, for `fpo align`.
CACHES: dict[str, Edit] = {
    "no manifest": without(MANIFEST_NAME),
    "a manifest that is no JSON": holding(MANIFEST_NAME, b"{"),
    "a manifest that is empty": holding(MANIFEST_NAME, b""),
    "a manifest of another thing": holding(MANIFEST_NAME, b'{"name": "app", "icons": []}'),
    "a manifest that is a list": holding(MANIFEST_NAME, b"[]"),
    "a manifest that is no UTF-8": holding(MANIFEST_NAME, b"\xff\xfe"),
    "a manifest nested deep": holding(MANIFEST_NAME, b"[" * 100_000),
    "a manifest that was edited": with_fields(MANIFEST_NAME, shards=[]),
    "a manifest that is a folder": lambda folder: (without(MANIFEST_NAME)(folder), (folder / MANIFEST_NAME).mkdir()),
    "another format": manifest(format_version=99),
    "a fingerprint of other settings": manifest(split="test"),
    "a shard left out": second_shard(Path.unlink),
    "a shard that is empty": second_shard(lambda path: path.write_bytes(b"")),
    "a shard with another byte": second_shard(lambda path: path.write_bytes(path.read_bytes()[:-1] + b"x")),
    "a shard too many": second_shard(lambda path: shutil.copy(path, path.with_name("more.parquet"))),
    "a shard that is a folder": second_shard(lambda path: (path.unlink(), path.mkdir())),
}


def make_bad_files(world: World, folder: Path) -> Path:
    """Writes them all, each kind in a folder of its own, and beside them what does not fit the world."""
    texts = {"data": DATA, "chats": CHATS, "templates": TEMPLATES, "configurations": CONFIGURATIONS}
    for kind, table in texts.items():
        (folder / kind).mkdir(parents=True)
        for name, content in table.items():
            (folder / kind / name).write_bytes(content)
    (folder / "questions").mkdir()
    for name, (_, content) in QUESTIONS.items():
        (folder / "questions" / name).write_bytes(content)
    folders = {"models": (world.gemma, MODELS), "saes": (world.saes[0], SAES), "caches": (world.cache, CACHES)}
    for kind, (sound, edits) in folders.items():
        for name, edit in edits.items():
            edit(shutil.copytree(sound, folder / kind / name))
    (folder / "scopes").mkdir()
    for name, (_, make) in SCOPES.items():
        make(folder / "scopes" / f"{name}.npz")
    _make_unfit(world, folder)
    _make_profiles(world, folder / "profiles")
    return folder


def _make_unfit(world: World, folder: Path) -> None:
    """Sound things that do not fit the world or each other."""
    for name, d_in, width, site in (
        ("narrow", 16, 64, SITES[0]),
        ("deep", 32, 64, Site(9, "resid_post")),
        ("twin", 32, 64, SITES[0]),
        ("unnamed", 32, 64, None),
    ):
        save_tiny_sae(folder / name, d_in, width, 3, "jumprelu", site)
    shutil.copytree(folder / "twin", folder / "foreign")
    with_metadata(hook_name="blocks.1.attn.hook_z")(folder / "foreign")
    write_rows(folder / "same.jsonl", [row | {"rejected": row["chosen"]} for row in rows(0, 3)])
    ran(world.precompute(folder / "few", keep_features=8, sae=world.saes[0]))
    ran(world.precompute(folder / "llama", model=world.llama, sae=world.saes[0]))
    shutil.copytree(world.gemma, folder / "gemma_with_another_tokenizer")
    shutil.copy(world.llama / "tokenizer.json", folder / "gemma_with_another_tokenizer")
    shutil.copytree(world.gemma, folder / "bloom")  # which has no attention of its own to replace
    bloom = BloomConfig(vocab_size=512, hidden_size=32, n_layer=4, n_head=2)
    BloomForCausalLM(bloom).save_pretrained(folder / "bloom")
    (folder / "chat.jsonl").write_bytes(lines({"messages": [said("user", "Hello"), said("assistant", "Yes.")]}))
    (folder / "empty").mkdir()
    (folder / "text.gguf").write_text("no weights at all")
    (folder / "splits").mkdir()
    for name in ("train.jsonl", "mixed-1.jsonl"):
        shutil.copy(world.data, folder / "splits" / name)
    shutil.copy(folder / "data" / "other columns.parquet", folder / "splits" / "mixed-2.parquet")
    for name, record in {"a list": b"[]", "no YAML": b"[", "no UTF-8": b"\xff", "other settings": b"lr: 1.0\n"}.items():
        (folder / "runs" / name).mkdir(parents=True)
        (folder / "runs" / name / "run.yaml").write_bytes(record)


def _make_profiles(world: World, folder: Path) -> None:
    """Profiles of the comparison that lack something."""
    tiny_profile(world, folder / "no SAE", table={"sae": [], "site": []})
    tiny_profile(world, folder / "another site", table={"ablation_sites": ["blocks.0.hook_resid_post"]})
    tiny_profile(world, folder / "no model", model=str(folder / "none"))
    tiny_profile(world, folder / "no data", dataset=str(folder / "none"))
    tiny_profile(world, folder / "a device", device="abacus")
    path = tiny_profile(world, folder / "no validation")
    path.write_text(path.read_text().replace("  validation_split: validation_prefs\n", ""))
