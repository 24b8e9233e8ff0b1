import json
import os
from pathlib import Path

import pytest
import torch
from fpo.cache.errors import UserError
from fpo.cache.files import user_folder
from fpo.stages.model import models
from fpo.stages.model.models import attentions_to_try, autocast, find_model, is_hub_id, load_model, remembered_sha256
from fpo.stages.model.tokenizer import check_vocabulary, load_tokenizer, tokenizer_sha256
from pairs import calm_gemma2, calm_llama
from tiny_tokenizers import chatml, gemma
from tiny_world import save_model
from transformers import AutoTokenizer, BloomConfig, BloomForCausalLM, PreTrainedTokenizerFast


@pytest.fixture
def folder(tmp_path):
    return save_model(tmp_path / "model", calm_llama, chatml())


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("{tmp}/none", ["no such path", "{tmp}/none"]),
        ("./none/here", ["no such path"]),
        ("a/b/c", ["no such path"]),
        ("none", ["hub id (owner/name)"]),
        ("~/none/x.gguf", [".gguf"]),
        ("package:no_such_wheel/x.gguf", ["'no_such_wheel'", "install"]),
        ("package:json/none.gguf", ["none.gguf"]),
        ("owner/nothing-of-this-name", ["owner/nothing-of-this-name", "the hub"]),
        ("{tmp}", ["config.json"]),
    ],
)
def test_a_name_that_leads_nowhere_is_refused_on_one_line(tmp_path, name, parts):
    with pytest.raises(UserError, match=r"\A[^\n]+\Z") as raised:
        find_model(name.format(tmp=tmp_path))
    for part in parts:
        assert part.format(tmp=tmp_path) in str(raised.value)


def test_pickled_weights_are_refused(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pickled weights are not read"):
        find_model(str(folder))


def test_weights_that_transformers_cannot_read_are_a_user_s_error(folder):
    (folder / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match=r"\Amodel [^\n]+ cannot load [^\n]+\Z"):
        load_model(find_model(str(folder)), attention="eager", device="cpu")


def test_missing_weights_are_not_filled_at_random(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"\Amodel [^\n]+up_proj[^\n]*\Z"):
        load_model(find_model(str(folder)), attention="eager", device="cpu")


def test_a_model_is_loaded_as_it_was_saved_in_fp32_without_dropout(tmp_path):
    saved = calm_llama(vocab_size=300, attention_dropout=0.5).to(torch.bfloat16)
    saved.save_pretrained(tmp_path)
    model = load_model(find_model(str(tmp_path)), attention="packed", device="cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not model.training
    for name, weight in saved.named_parameters():
        assert torch.equal(model.get_parameter(name), weight.float())
    tokens = torch.arange(20)[None]
    model.train()
    assert torch.equal(model(tokens).logits, model(tokens).logits)


def test_attention_that_a_model_does_not_have_is_refused(tmp_path):
    BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=16, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    source = find_model(str(tmp_path))
    assert attentions_to_try("auto", source, "cpu") == ("eager",)
    with pytest.raises(ValueError, match=r"\Amodel [^\n]+\Z"):
        load_model(source, attention="packed", device="cpu")


@pytest.mark.parametrize("make", [calm_gemma2, calm_llama])
def test_attention_is_the_fastest_that_the_model_has_on_cpu(tmp_path, make):
    make().save_pretrained(tmp_path)
    assert attentions_to_try("auto", find_model(str(tmp_path)), "cpu") == ("packed", "eager")
    assert attentions_to_try("eager", find_model(str(tmp_path)), "cpu") == ("eager",)


def test_flex_attention_is_refused_on_cpu_where_it_has_no_backward(folder):
    with pytest.raises(ValueError, match=r"^--attention: .*packed_flex"):
        attentions_to_try("packed_flex", find_model(str(folder)), "cpu")


def test_the_hash_is_that_of_weights_and_configuration_alone(folder, tmp_path):
    before = find_model(str(folder)).sha256
    copy = save_model(tmp_path / "copy", calm_llama, chatml())
    (copy / "README.md").write_text("another")
    assert find_model(str(copy)).sha256 == before
    assert find_model(str(save_model(tmp_path / "seed", lambda **k: calm_llama(1, **k), chatml()))).sha256 != before
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    assert find_model(str(copy)).sha256 != before


def test_a_file_s_hash_is_remembered_until_size_or_time_change(tmp_path, monkeypatch):
    read = []
    real = models.sha256_file
    monkeypatch.setattr(models, "sha256_file", lambda path: read.append(path) or real(path))
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    first = remembered_sha256(path)
    assert (remembered_sha256(path), len(read)) == (first, 1)
    path.write_bytes(b"other")
    other = remembered_sha256(path)
    assert (other == first, len(read)) == (False, 2)
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert (remembered_sha256(path), len(read)) == (other, 3)
    (tmp_path / "link").symlink_to(path)
    assert (remembered_sha256(tmp_path / "link"), len(read)) == (other, 3)


def test_a_damaged_memory_costs_a_reading_and_nothing_else(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    first = remembered_sha256(path)
    memory = user_folder() / "hashes.json"
    for content in ("{", "[]", '{"x": 1}'):
        memory.write_text(content)
        assert remembered_sha256(path) == first
    assert json.loads(memory.read_text())[str(path.resolve())][2] == first


@pytest.mark.parametrize("make", [chatml, gemma])
def test_a_tokenizer_s_hash_survives_saving_use_and_another_template(tmp_path, make):
    tokenizer = make()
    before = tokenizer_sha256(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer_sha256(loaded) == before
    loaded(["a", "b c d"], truncation=True, max_length=2, padding=False)
    loaded.chat_template = "{{ messages }}"
    assert tokenizer_sha256(loaded) == before
    loaded.save_pretrained(tmp_path / "again")
    assert tokenizer_sha256(AutoTokenizer.from_pretrained(tmp_path / "again")) == before


def test_a_tokenizer_s_hash_changes_with_vocabulary_and_special_tokens():
    def tokenizer(**special: str) -> PreTrainedTokenizerFast:
        made = PreTrainedTokenizerFast(tokenizer_object=chatml().backend_tokenizer)
        made.add_special_tokens({"eos_token": "<|endoftext|>", **special})
        return made

    base, more = tokenizer(), tokenizer()
    more.add_tokens(["Paris!"])
    found = [tokenizer_sha256(t) for t in (base, more, tokenizer(eos_token="<|im_end|>"), gemma())]
    assert len(set(found)) == 4


def test_a_model_without_a_tokenizer_is_a_user_s_error(tmp_path):
    calm_llama().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"\Amodel [^\n]+: transformers cannot load its tokenizer: [^\n]+\Z"):
        load_tokenizer(find_model(str(tmp_path)))


def test_a_model_embeds_every_token_that_its_tokenizer_can_write():
    tokenizer = chatml()
    check_vocabulary(calm_llama(vocab_size=len(tokenizer)), tokenizer, [len(tokenizer) - 1])
    with pytest.raises(
        ValueError, match=f"below {len(tokenizer) - 1}, which the model embeds, found {len(tokenizer) - 1} "
    ):
        check_vocabulary(calm_llama(vocab_size=len(tokenizer) - 1), tokenizer)
    with pytest.raises(ValueError, match=f"found {len(tokenizer)} "):  # which a template writes
        check_vocabulary(calm_llama(vocab_size=len(tokenizer)), tokenizer, [len(tokenizer)])


def test_only_the_bf16_recipe_computes_in_bf16():
    x = torch.ones(2, 2)
    for recipe, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        with autocast(recipe, "cpu"):
            assert (x @ x).dtype == dtype


def test_the_default_device_is_one_that_torch_has():
    assert torch.empty(0, device=models.default_device()).device.type in ("cpu", "cuda")


def test_a_packaged_file_is_found_without_importing_the_package(tmp_path, monkeypatch):
    package = tmp_path / "wheel_with_weights"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "tiny.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(tmp_path)
    source = find_model("package:wheel_with_weights/tiny.gguf")
    assert (source.folder, source.gguf_file) == (Path(package).resolve(), "tiny.gguf")


def test_names_that_only_the_hub_can_know(tmp_path):
    assert is_hub_id("google/gemma-2-2b")
    local = (str(tmp_path), "./a/b", "~/a", "package:llm/file.gguf", "a/b.gguf", "/nowhere/model", "a/b/c", "model")
    assert not any(map(is_hub_id, local))
