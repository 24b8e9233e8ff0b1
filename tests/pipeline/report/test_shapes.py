import pytest
import torch
from fpo.pipeline.report.shapes import Shape, is_hub_id, shape_of, shape_of_config
from fpo.stages.model.models import find_model, load_model
from hypothesis import given
from hypothesis import strategies as st
from pairs import few_examples
from tiny import tiny_gemma2, tiny_llama
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, DynamicCache, Gemma2Config, GPT2Config, LlamaConfig


@pytest.fixture(scope="module")
def gemma_2b():
    return shape_of_config(Gemma2Config(), "2b")


@pytest.mark.parametrize(
    ("name", "body", "everything"),
    [
        ("google/gemma-2-2b", 2_024_517_888, 2_614_341_888),
        ("google/gemma-2-9b", 8_324_201_984, 9_241_705_984),
        ("google/gemma-3-270m", 100_326_016, 268_098_176),
    ],
)
def test_models_that_cannot_be_read_offline_have_their_published_sizes(name, body, everything):
    shape = shape_of(name)
    assert (shape.body, shape.parameters) == (body, everything)


@few_examples
@given(
    layers=st.integers(1, 4),
    hidden=st.integers(1, 8).map(lambda n: 8 * n),
    heads=st.sampled_from([(1, 1), (4, 2), (8, 2)]),
    vocabulary=st.integers(2, 300),
    inner=st.integers(1, 100),
    tied=st.booleans(),
)
def test_parameters_are_those_that_gemma_2_s_matrices_add_up_to(layers, hidden, heads, vocabulary, inner, tied):
    config = Gemma2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        head_dim=16,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        tie_word_embeddings=tied,
    )
    shape = shape_of_config(config, "tiny")
    attention = 16 * hidden * (2 * heads[0] + 2 * heads[1])
    assert shape.body == layers * (attention + 3 * hidden * inner + 4 * hidden) + hidden
    assert shape.parameters == shape.body + vocabulary * hidden * (1 if tied else 2)
    assert shape.norms == 4


def test_a_local_model_has_the_parameters_that_loading_it_gives(world):
    shape = shape_of(str(world.gemma))
    model = load_model(find_model(str(world.gemma)), attention="eager", device="cpu")
    assert shape.parameters == sum(weight.numel() for weight in model.parameters())
    assert not shape.sdpa and shape.flex and shape_of(str(world.llama)).sdpa


def test_the_figures_of_gemma_2_2b(gemma_2b):
    context = 1024
    assert gemma_2b.layer_flops(1, 0) == pytest.approx(4.05e9, rel=0.02)
    assert gemma_2b.head_flops(1) == pytest.approx(1.18e9, rel=0.02)
    attention = gemma_2b.layer_flops(context, context**2 / 2) / context - gemma_2b.layer_flops(1, 0)
    assert attention == pytest.approx(0.11e9, rel=0.02)


@pytest.mark.parametrize("make", [tiny_gemma2, tiny_llama])
def test_flops_are_those_that_torch_counts(make):
    model, length = make(hidden_size=64, intermediate_size=256, attn_implementation="eager"), 48
    shape = shape_of_config(model.config, "tiny")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.zeros(1, length, dtype=torch.int64), use_cache=False)
    # Without a kernel that skips them, masked positions are computed as well.
    assert shape.layer_flops(length, length**2) + shape.head_flops(length) == pytest.approx(
        counter.get_total_flops(), rel=0.02
    )


@pytest.mark.parametrize("recipe", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "attention"), [("gemma2", "eager"), ("llama", "eager"), ("llama", "packed")])
def test_a_layer_s_activations_are_those_that_autograd_saves(kind, attention, recipe):
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = {"gemma2": Gemma2Config, "llama": LlamaConfig}[kind](
        **sizes,
        vocab_size=64,
        num_hidden_layers=2,
        head_dim=64,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    matrices = [tuple(part.weight.shape) for part in model.modules() if isinstance(part, torch.nn.Linear)]
    copies = {*matrices, *(shape[::-1] for shape in matrices)}
    weights = {weight.data_ptr() for weight in model.parameters()}
    saved: dict[int, int] = {}

    def save(tensor):
        storage = tensor.untyped_storage()
        # Weights, and autocast's copies of them, are counted with the model.
        if storage.data_ptr() not in weights and tuple(tensor.shape) not in copies:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    length = 192
    bf16 = recipe is torch.bfloat16
    hooks = torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        hidden = model.model(input_ids=torch.zeros(1, length, dtype=torch.int64), use_cache=False).last_hidden_state
    expected = 2 * shape_of_config(config, "").layer_bytes(length, 2 if bf16 else 4, attention == "eager")
    assert sum(saved.values()) == pytest.approx(expected, rel=0.2)
    assert hidden.requires_grad


def test_keys_and_values_are_those_of_the_model_s_cache():
    model, cache = tiny_llama(), DynamicCache()
    model(input_ids=torch.zeros(3, 7, dtype=torch.int64), past_key_values=cache)
    stored = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert shape_of_config(model.config, "").kv_bytes(3 * 7, 4) == stored


def test_an_adapter_has_the_parameters_that_peft_gives_it():
    from peft import LoraConfig, get_peft_model

    model = tiny_gemma2()
    shape = shape_of_config(model.config, "")
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    assert adapted.get_nb_trainable_parameters()[0] == 4 * shape.linear_edges


@few_examples
@given(tokens=st.integers(1, 10**6), more=st.integers(1, 10**6), attended=st.integers(0, 10**9))
def test_more_tokens_and_more_layers_take_more(gemma_2b, tokens, more, attended):
    larger = Shape(**{**vars(gemma_2b), "layers": gemma_2b.layers + more, "body": gemma_2b.body + more})
    for shape, count in ((gemma_2b, tokens + more), (larger, tokens)):
        assert shape.layer_flops(count, attended) > gemma_2b.layer_flops(tokens, attended) - 1
        assert shape.kv_bytes(count, 2) > gemma_2b.kv_bytes(tokens, 2)
    assert gemma_2b.layer_bytes(tokens + more, 2, False) > gemma_2b.layer_bytes(tokens, 2, False)


def test_names_that_only_the_hub_can_know(tmp_path):
    assert is_hub_id("google/gemma-2-2b")
    for name in (
        str(tmp_path),
        "./a/b",
        "~/a",
        "package:llm/file.gguf",
        "a/b.gguf",
        "/nowhere/model",
        "a/b/c",
        "model",
    ):
        assert not is_hub_id(name)


def test_what_has_no_shape_is_refused_in_one_line(tmp_path):
    GPT2Config().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    for name, part in ((str(tmp_path), "gpt2"), (str(tmp_path / "none"), "none"), ("nobody/nothing", "hub")):
        with pytest.raises((ValueError, FileNotFoundError), match=rf"\A[^\n]*{part}[^\n]*\Z"):
            shape_of(name)
