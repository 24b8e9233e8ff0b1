"""What a stranger could put into a folder so that it runs code or writes elsewhere: as the marker that it makes.

In: a folder, and the path of a marker. Out: the folder with something planted in it.
"""

import gzip
import io
import json
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from bad_files import SAE_WEIGHTS, TURNS, WEIGHTS, lines, pair, with_fields, with_metadata
from safetensors.numpy import save_file

# From the folder and the marker; the change is made in place.
Plant = Callable[[Path, Path], Any]


class Trap:
    """An object that makes the marker when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.marker), "w")


def code(marker: Path) -> str:
    """A module that makes the marker when it is imported, with every class that a configuration here names."""
    classes = "".join(f"class {name}: pass\n" for name in ("Config", "Model", "Tokenizer"))
    return f"open({str(marker)!r}, 'w')\n{classes}"


def pickled(name: str, *, zipped: bool = True) -> Plant:
    """A file that is a pickle, as torch saves one now or did once."""

    def plant(folder: Path, marker: Path) -> None:
        torch.save({"state": Trap(marker)}, folder / name, _use_new_zipfile_serialization=zipped)

    return plant


def both(*plants: Plant) -> Plant:
    return lambda folder, marker: [plant(folder, marker) for plant in plants]


def without(name: str) -> Plant:
    return lambda folder, marker: (folder / name).unlink()


def fields(name: str, **changes: Any) -> Plant:
    return lambda folder, marker: with_fields(name, **changes)(folder)


def text(name: str, content: str) -> Plant:
    """A file; `MARKER` in it is the marker's path."""
    return lambda folder, marker: (folder / name).write_text(content.replace("MARKER", str(marker)))


def module(name: str) -> Plant:
    return lambda folder, marker: (folder / name).write_text(code(marker))


def link(name: str) -> Plant:
    """A link to a folder elsewhere, which would show what is written through it."""

    def plant(folder: Path, marker: Path) -> None:
        marker.parent.mkdir(parents=True, exist_ok=True)
        (marker.parent / "config.json").write_text("elsewhere")
        (folder / name).symlink_to(marker.parent)

    return plant


def link_to_file(name: str) -> Plant:
    """A link to a file elsewhere in place of one here, with the same content."""

    def plant(folder: Path, marker: Path) -> None:
        elsewhere = marker.parent / Path(name).name
        elsewhere.parent.mkdir(parents=True, exist_ok=True)
        elsewhere.write_bytes((folder / name).read_bytes() if (folder / name).exists() else b"elsewhere")
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(elsewhere)

    return plant


MAPS = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model", "AutoTokenizer": ["code.Tokenizer", None]}
ELSEWHERE = {name: f"owner/name--{MAPS[name]}" for name in ("AutoConfig", "AutoModelForCausalLM")}
ADAPTER = {
    "peft_type": "LORA",
    "base_model_name_or_path": "/elsewhere",
    "target_modules": ["layers.0.self_attn.q_proj"],
    "r": 1,
}
ADAPTER |= {"auto_mapping": {"base_model_class": "Model", "parent_library": "code"}}
INDEX = {"metadata": {}, "weight_map": {"model.norm.weight": "../elsewhere.safetensors"}}

# Model folders, and whether each is refused or loads as if nothing had been planted.
MODELS: dict[str, tuple[Plant, bool]] = {
    "pickled weights alone": (both(without(WEIGHTS), pickled("pytorch_model.bin")), True),
    "pickled weights beside sound ones": (pickled("pytorch_model.bin"), False),
    "a pickle for safetensors": (pickled(WEIGHTS), True),
    "code for a known kind": (both(module("code.py"), fields("config.json", auto_map=MAPS)), False),
    "code for an unknown kind": (
        both(module("code.py"), fields("config.json", auto_map=MAPS, model_type="strange")),
        True,
    ),
    "code in another repository": (fields("config.json", auto_map=ELSEWHERE, model_type="strange"), True),
    "code for the tokenizer": (
        both(module("code.py"), fields("tokenizer_config.json", auto_map=MAPS, tokenizer_class="Tokenizer")),
        False,
    ),
    "code that generates": (
        lambda folder, marker: (
            (folder / "custom_generate").mkdir(),
            module("custom_generate/generate.py")(folder, marker),
        ),
        False,
    ),
    "attention from a repository": (fields("config.json", _attn_implementation="owner/name"), False),
    "code for an unknown kind with a known tokenizer": (
        both(
            module("code.py"),
            fields("config.json", auto_map=MAPS, model_type="strange"),
            fields("tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast"),
        ),
        True,
    ),
    "an adapter beside a model": (
        both(text("adapter_config.json", json.dumps(ADAPTER)), pickled("adapter_model.bin"), module("code.py")),
        True,
    ),
    "an adapter that loads": (
        both(
            text("adapter_config.json", json.dumps(ADAPTER | {"auto_mapping": None})),
            lambda folder, marker: save_file(
                {
                    f"base_model.model.model.layers.0.self_attn.q_proj.lora_{part}.weight": np.ones(shape, np.float32)
                    for part, shape in (("A", (1, 32)), ("B", (32, 1)))
                },
                folder / "adapter_model.safetensors",
            ),
        ),
        True,
    ),
    "an adapter alone": (
        both(
            without("config.json"),
            without(WEIGHTS),
            text("adapter_config.json", json.dumps(ADAPTER)),
            pickled("adapter_model.bin"),
        ),
        True,
    ),
    "an index of weights elsewhere": (text("model.safetensors.index.json", json.dumps(INDEX)), True),
}

# Expressions that lead out of a sandbox that is not one.
ESCAPES = [
    "().__class__.__mro__[1].__subclasses__()",
    "cycler.__init__.__globals__.os.system('touch MARKER')",
    "lipsum.__globals__['os'].popen('touch MARKER').read()",
    "(lipsum|attr('__globals__'))['os'].system('touch MARKER')",
    "raise_exception.__globals__['__builtins__']['open']('MARKER', 'w')",
    "strftime_now.__globals__['__builtins__']['open']('MARKER', 'w')",
    "self.__init__.__globals__['__builtins__']['open']('MARKER', 'w')",
    "namespace.__init__.__globals__['jinja2'].utils.open('MARKER', 'w')",
    "dict.__class__.__base__.__subclasses__()",
    "'{0.__class__.__init__.__globals__}'.format(cycler('a'))",
    "[cycler]|map(attribute='__init__.__globals__.os')|list",
    "messages.append({'role': 'user', 'content': 'more'})",
    "messages[0].update({'content': 'other'})",
]


def escape(expression: str) -> Plant:
    """A chat template that evaluates an expression, and says what there is to say."""
    return text("chat_template.jinja", f"{{% set found = {expression} %}}{TURNS}")


# SAE folders; all are refused.
SAES: dict[str, Plant] = {
    "a pickle for weights": both(without(SAE_WEIGHTS), pickled("sae_weights.pt"), pickled("sae.pt")),
    "a pickle for safetensors": pickled(SAE_WEIGHTS),
    "a pickle for cfg.json": pickled("cfg.json"),
    "a module for an architecture": both(module("code.py"), fields("cfg.json", architecture="code.Model")),
    "an expression for a kind of number": fields("cfg.json", dtype="__import__('os').getcwd()"),
    "an expression for a site": lambda folder, marker: with_metadata(hook_name="blocks.{open}.hook_resid_post")(folder),
}


def _object_arrays(path: Path, marker: Path) -> None:
    np.savez(path, W_enc=np.array([Trap(marker)], dtype=object), allow_pickle=True)


# SAEs in Gemma Scope's format; all are refused.
SCOPES: dict[str, Plant] = {
    "arrays of objects": _object_arrays,
    "a pickle": lambda path, marker: path.write_bytes(pickle.dumps(Trap(marker))),
    "a file of torch": lambda path, marker: torch.save(Trap(marker), path),
}


def _extension(folder: Path, marker: Path) -> None:
    """A type that pyarrow once unpickled, and columns that pandas would."""
    said = {
        b"ARROW:extension:name": b"arrow.py_extension_type",
        b"ARROW:extension:metadata": pickle.dumps(Trap(marker)),
    }
    columns = [pa.array([f"Is it so? {answer}"] * 3) for answer in ("Yes it is.", "No.")]
    schema = pa.schema([pa.field(name, pa.string(), metadata=said) for name in ("chosen", "rejected")])
    table = pa.Table.from_arrays(columns, schema=schema)
    pq.write_table(table.replace_schema_metadata({"pandas": pickle.dumps(Trap(marker))}), folder / "train.parquet")


def _archive(folder: Path, marker: Path) -> None:
    """An archive with a way out, under the name of text."""
    with tarfile.open(folder / "train.jsonl", "w") as archive:
        member = tarfile.TarInfo("../" * 20 + str(marker).lstrip("/"))
        archive.addfile(member, io.BytesIO(b""))


def _zip(folder: Path, marker: Path) -> None:
    with zipfile.ZipFile(folder / "train.jsonl", "w") as archive:
        archive.writestr("../" * 20 + str(marker).lstrip("/"), "")


SOUND_ROWS = lines(*(pair(chosen="a b", rejected=f"a c {number}") for number in range(3)))

# Data sets, and whether each is refused.
DATA: dict[str, tuple[Plant, bool]] = {
    "a loading script alone": (module("train.py"), True),
    "a loading script beside data": (
        lambda folder, marker: (module(f"{folder.name}.py")(folder, marker), _rows(folder / "train.jsonl")),
        False,
    ),
    "a pickle": (lambda folder, marker: (folder / "train.pkl").write_bytes(pickle.dumps(Trap(marker))), True),
    "a pickle for text": (pickled("train.jsonl"), True),
    "a type that is a pickle": (_extension, False),
    "an archive for text": (_archive, True),
    "a zip for text": (_zip, True),
    "packed text": (lambda f, marker: (f / "train.jsonl").write_bytes(gzip.compress(SOUND_ROWS)), True),
}


def _rows(path: Path) -> None:
    path.write_bytes(SOUND_ROWS)


LAST = "checkpoint-2"
STEP = {"step": "2; import os"}

# A run's folder that is gone on with, and whether each is refused.
RUNS: dict[str, tuple[Plant, bool]] = {
    "a pickled optimizer": (pickled(f"{LAST}/optimizer.pt"), True),
    "a pickled optimizer of old": (pickled(f"{LAST}/optimizer.pt", zipped=False), True),
    "a pickled schedule": (pickled(f"{LAST}/scheduler.pt"), True),
    "a pickled state of chance": (pickled(f"{LAST}/rng_state.pth"), True),
    "pickled weights": (both(without(f"{LAST}/{WEIGHTS}"), pickled(f"{LAST}/pytorch_model.bin")), True),
    "pickled settings": (pickled(f"{LAST}/training_args.bin"), False),
    "a state of another thing": (text(f"{LAST}/trainer_state.json", '{"global_step": 2, "open": "MARKER"}'), True),
    "a state of other steps": (fields(f"{LAST}/trainer_state.json", log_history=[STEP]), True),
    "a state nested deep": (text(f"{LAST}/trainer_state.json", "[" * 100_000), False),
    "a record with tags": (text("run.yaml", "model: !!python/object/apply:open [MARKER, w]\n"), True),
    "a log elsewhere": (link_to_file("metrics.jsonl"), True),
    "a checkpoint elsewhere": (link("checkpoint-3"), True),
    "a folder to save in elsewhere": (link(".new"), True),
}

# A cache that is written to again (`--repair`), and whether each is refused.
CACHES: dict[str, tuple[Plant, bool]] = {
    "shards elsewhere": (
        lambda folder, marker: ((folder / "data").rename(marker.parent), link("data")(folder, marker)),
        True,
    ),
    "locks elsewhere": (
        lambda folder, marker: ((folder / ".locks").rename(marker.parent), link(".locks")(folder, marker)),
        True,
    ),
    "a shard elsewhere": (link_to_file("data/train-00001-of-00004.parquet"), False),
    "a manifest elsewhere": (link_to_file("manifest.json"), False),
    "a lock elsewhere": (both(without("data/train-00001-of-00004.parquet"), link_to_file(".locks/00001.lock")), True),
    "a page elsewhere": (link_to_file("README.md"), False),
    "options with tags": (text("run.yaml", "!!python/object/apply:open [MARKER, w]\n"), False),
}
