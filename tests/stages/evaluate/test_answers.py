import json
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fpo.cache.errors import UserError
from fpo.stages.data.chat import ChatFormat, Example, Message, Turns
from fpo.stages.evaluate import answers
from fpo.stages.evaluate.answers import answer_questions, read_questions, write_answers, write_benchmark_answers
from fpo.stages.evaluate.generate import Sampling, generate
from tiny import tiny_gemma2, tiny_llama
from tiny_tokenizers import chatml, gemma

ALPACA_EVAL = [
    {"instruction": "Who is Larry Page?", "output": "A founder.", "generator": "text_davinci_003", "dataset": "vicuna"},
    {"instruction": "Grüße?", "output": "", "generator": "text_davinci_003", "dataset": "koala"},
    {"instruction": "Grüße?", "output": "", "generator": "text_davinci_003", "dataset": "koala"},
]
ARENA_HARD_V01 = [
    {"question_id": "96d2", "category": "arena-hard-v0.1", "cluster": "Keys", "turns": [{"content": "Can one?"}]},
    {"question_id": "4f8b", "category": "arena-hard-v0.1", "cluster": "Keys", "turns": [{"content": "How\u2028so?"}]},
]
ARENA_HARD_V2 = [
    {"uid": "0001b527", "category": "hard_prompt", "subcategory": "coding", "prompt": "Write a loop."},
    {"uid": "00a38edd", "category": "creative_writing", "subcategory": "poem", "prompt": "Write a line."},
]
MT_BENCH = [
    {"question_id": 81, "category": "writing", "turns": ["Write a post.", "Start with A."]},
    {"question_id": 111, "category": "math", "turns": ["What is its area?", "And twice?"], "reference": ["3", "6"]},
    {"question_id": 121, "category": "humanities", "turns": ["Why?"]},
    {"question_id": 130, "category": "stem", "turns": ["How?", "When?"]},
    {"question_id": 131, "category": "a new one", "turns": ["Who?"]},
]


def write_list(path: Path, rows: list[Any]) -> Path:
    path.write_text(json.dumps(rows))
    return path


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def echo(conversations: list[Turns], temperatures: list[float]) -> list[str]:
    """An answer that says all that it was asked with."""
    return [
        f"[{'|'.join(message.content for message in turns)} at {temperature}]"
        for turns, temperature in zip(conversations, temperatures, strict=True)
    ]


def written(tmp_path: Path, benchmark: Any, rows: list[Any], respond: Any = echo, name: str = "fpo") -> Any:
    """What is in the answer file, by question file and back, with the ids of the answers apart."""
    make = write_list if benchmark == "alpaca-eval" else write_lines
    questions = read_questions(make(tmp_path / "questions", rows), benchmark)
    out = tmp_path / "answers"
    write_answers(out, questions, answer_questions(questions, respond), name)
    text = out.read_text(encoding="utf-8")
    if benchmark == "alpaca-eval":
        return json.loads(text)
    assert text.endswith("\n")
    return [json.loads(line) for line in text.removesuffix("\n").split("\n")]


@pytest.fixture
def at_noon(monkeypatch):
    monkeypatch.setattr(answers.time, "time", lambda: 43200.5)


def test_alpaca_eval_outputs(tmp_path):
    assert written(tmp_path, "alpaca-eval", ALPACA_EVAL) == [
        {
            "dataset": "vicuna",
            "instruction": "Who is Larry Page?",
            "output": "[Who is Larry Page? at 0.7]",
            "generator": "fpo",
        },
        {"dataset": "koala", "instruction": "Grüße?", "output": "[Grüße? at 0.7]", "generator": "fpo"},
        {"dataset": "koala", "instruction": "Grüße?", "output": "[Grüße? at 0.7]", "generator": "fpo"},
    ]


def test_arena_hard_answers_of_the_first_version(tmp_path, at_noon):
    records = written(tmp_path, "arena-hard", ARENA_HARD_V01)
    assert len({uuid.UUID(record.pop("answer_id")) for record in records}) == 2
    assert records == [
        {
            "question_id": "96d2",
            "model_id": "fpo",
            "choices": [{"index": 0, "turns": [{"content": "[Can one? at 0.0]"}]}],
            "tstamp": 43200.5,
        },
        {
            "question_id": "4f8b",
            "model_id": "fpo",
            "choices": [{"index": 0, "turns": [{"content": "[How\u2028so? at 0.0]"}]}],
            "tstamp": 43200.5,
        },
    ]


def test_arena_hard_answers_of_the_second_version(tmp_path, at_noon):
    records = written(tmp_path, "arena-hard", ARENA_HARD_V2)
    assert len({uuid.UUID(record.pop("ans_id")) for record in records}) == 2
    assert records == [
        {
            "uid": "0001b527",
            "model": "fpo",
            "messages": [
                {"role": "user", "content": "Write a loop."},
                {"role": "assistant", "content": {"answer": "[Write a loop. at 0.0]"}},
            ],
            "tstamp": 43200.5,
        },
        {
            "uid": "00a38edd",
            "model": "fpo",
            "messages": [
                {"role": "user", "content": "Write a line."},
                {"role": "assistant", "content": {"answer": "[Write a line. at 0.0]"}},
            ],
            "tstamp": 43200.5,
        },
    ]


def test_mt_bench_answers_whose_later_turns_hold_the_earlier_ones(tmp_path, at_noon):
    records = written(tmp_path, "mt-bench", MT_BENCH)
    assert len({uuid.UUID(record.pop("answer_id")) for record in records}) == 5
    turns = [
        ["[Write a post. at 0.7]", "[Write a post.|[Write a post. at 0.7]|Start with A. at 0.7]"],
        ["[What is its area? at 0.0]", "[What is its area?|[What is its area? at 0.0]|And twice? at 0.0]"],
        ["[Why? at 0.1]"],
        ["[How? at 0.1]", "[How?|[How? at 0.1]|When? at 0.1]"],
        ["[Who? at 0.7]"],
    ]
    assert records == [
        {"question_id": number, "model_id": "fpo", "choices": [{"index": 0, "turns": own}], "tstamp": 43200.5}
        for number, own in zip((81, 111, 121, 130, 131), turns, strict=True)
    ]


def test_a_given_temperature_is_that_of_every_answer(tmp_path):
    questions = read_questions(write_lines(tmp_path / "q", MT_BENCH), "mt-bench")
    seen: list[float] = []

    def respond(conversations: list[Turns], temperatures: list[float]) -> list[str]:
        assert all(
            [message.role for message in turns][::2] == ["user"] * (len(turns) // 2 + 1) for turns in conversations
        )
        assert all(
            [message.role for message in turns][1::2] == ["assistant"] * (len(turns) // 2) for turns in conversations
        )
        seen.extend(temperatures)
        return ["x"] * len(conversations)

    assert answer_questions(questions, respond, 0.3) == [["x", "x"], ["x", "x"], ["x"], ["x", "x"], ["x"]]
    assert seen == [0.3] * 8


def test_an_answers_id_is_that_of_its_content(tmp_path):
    def ids(name: str = "fpo", text: str = "yes") -> list[str]:
        records = written(tmp_path, "mt-bench", MT_BENCH, lambda turns, _: [text] * len(turns), name)
        return [record["answer_id"] for record in records]

    assert ids() == ids()
    assert len({*ids(), *ids(name="dpo"), *ids(text="no")}) == 15


@pytest.mark.parametrize(
    ("benchmark", "content", "expected"),
    [
        (
            "alpaca-eval",
            '{"instruction": "Hi"}',
            "questions: expected JSON of questions, found none (its JSON: Input should",
        ),
        ("alpaca-eval", "[]", "questions: expected at least one question, found none; "),
        ("alpaca-eval", '[{"instruction": "Hi"', "questions: expected JSON of questions, found none (Expecting "),
        ("alpaca-eval", '["Hi"]', "questions, entry 1: Input should be an object, found Hi; "),
        (
            "alpaca-eval",
            '[{"instruction": "Hi", "dataset": "d"}, {"dataset": "d"}]',
            "questions, entry 2.instruction: Field required, found {'dataset': 'd'}; ",
        ),
        (
            "alpaca-eval",
            '[{"instruction": " ", "dataset": "d"}]',
            "questions, entry 1.instruction: expected words of the user, found  ; ",
        ),
        ("arena-hard", "", "questions: expected at least one question, found none; "),
        ("arena-hard", "[1]", "questions, line 1: Input should be an object, found [1]; "),
        ("arena-hard", '{"question_id": "a"}', "questions, line 1.turns: Field required, found {'question_id': 'a'}; "),
        (
            "arena-hard",
            '{"question_id": "a", "turns": [{"content": ["Hi", ["a.png"]]}]}',
            "questions, line 1.turns.0.content: Input should be a valid string, found ['Hi', ['a.png']]; ",
        ),
        (
            "arena-hard",
            '{"uid": "a", "prompt": "Hi"}\n\n{"question_id": "b", "turns": [{"content": "Hi"}]}',
            "questions, line 3.uid: Field required, found {'question_id': 'b', ",
        ),
        (
            "arena-hard",
            '{"uid": "a", "prompt": "Hi"}\n{"uid": "a", "prompt": "Ho"}',
            "questions, line 2: expected an id of its own, found 'a' again; ",
        ),
        ("mt-bench", '{"question_id": 81,', "questions, line 1: expected JSON of questions, found none "),
        ("mt-bench", "\udc80", "questions, line 1: expected JSON of questions, found none "),
        (
            "mt-bench",
            '{"question_id": "81", "category": "math", "turns": ["Hi"]}',
            "questions, line 1.question_id: Input should be a valid integer, found 81; ",
        ),
        (
            "mt-bench",
            '{"question_id": 81, "category": "math", "turns": ["Hi", 3]}',
            "questions, line 1.turns.1: Input should be a valid string, found 3; ",
        ),
        (
            "mt-bench",
            '{"question_id": 81, "category": "math", "turns": []}',
            "questions, line 1.turns: List should have at least 1 item after validation, not 0, found []; ",
        ),
    ],
)
def test_malformed_questions_are_refused_in_one_line(tmp_path, benchmark, content, expected):
    path = tmp_path / "questions"
    path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(UserError) as caught:
        read_questions(path, benchmark)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}/{expected}")
    assert message.endswith(f"; give the questions of {benchmark} as they are published")
    assert "\n" not in message


def test_questions_that_are_not_there_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"^questions: expected a file, found none at .*none\.jsonl$"):
        read_questions(tmp_path / "none.jsonl", "mt-bench")


CHAT = ChatFormat(gemma())


@pytest.fixture(scope="module")
def model():
    return tiny_gemma2(vocab_size=len(gemma()))


def ignorant(**overrides: Any) -> Any:
    """A model to which all tokens are alike, always."""
    model = tiny_llama(vocab_size=len(gemma()), tie_word_embeddings=False, **overrides)
    model.lm_head.weight.data.zero_()
    return model


def run(model: Any, folder: Path, rows: list[Any], temperature: float | None = 0.5, **changes: Any) -> list[Any]:
    """The answers to MT-Bench questions, turn by turn."""
    out = folder / "fpo.jsonl"
    sampling = Sampling(**{"max_new_tokens": 6, "batch": 3} | changes)
    questions = read_questions(write_lines(folder / "question.jsonl", rows), "mt-bench")
    write_benchmark_answers(model, CHAT, questions, out, model_name="fpo", sampling=sampling, temperature=temperature)
    return [json.loads(line)["choices"][0]["turns"] for line in out.read_text().splitlines()]


@pytest.mark.parametrize("chat", [CHAT, ChatFormat(chatml())])
def test_prompts_are_those_of_training(chat):
    turns = (Message("system", "Be brief."), Message("user", "Hi"), Message("assistant", "Ho"), Message("user", "So?"))
    yes, no = ((Message("assistant", text),) for text in ("Yes.", "No."))
    assert chat.prompt_ids(turns) == chat.prompt_and_responses(Example(turns, yes, no))[0]


def test_a_models_answers_are_its_greedy_ones_where_the_benchmark_has_no_randomness(tmp_path, model):
    def greedy(turns: Turns) -> str:
        prompt = np.asarray(CHAT.prompt_ids(turns), dtype=np.int32)
        alone = Sampling(temperature=0, max_new_tokens=6)
        ((ids,),) = generate(model, [prompt], samples=1, sampling=alone, end_id=CHAT.end_id)
        return str(CHAT.tokenizer.decode(ids, skip_special_tokens=True)).strip()

    turns = run(model, tmp_path, MT_BENCH, None)
    assert [len(own) for own in turns] == [2, 2, 1, 2, 1]
    asked = (Message("user", "What is its area?"),)
    first = greedy(asked)
    second = greedy((*asked, Message("assistant", first), Message("user", "And twice?")))
    assert turns[1] == [first, second]
    assert first != second
    assert run(model, tmp_path, MT_BENCH, 0)[1] == turns[1]
    assert run(model, tmp_path, MT_BENCH, 5)[1] != turns[1]


def test_answers_are_the_same_again_but_for_the_time(tmp_path, model):
    turns = run(model, tmp_path, MT_BENCH)
    assert run(model, tmp_path, MT_BENCH) == turns
    assert run(model, tmp_path, MT_BENCH, seed=7) != turns


def test_no_turn_is_drawn_with_anothers_random_numbers(tmp_path):
    """Under a model that knows nothing, equal random numbers would give equal answers."""
    turns = run(ignorant(), tmp_path, MT_BENCH, 1.0, top_p=1.0, max_new_tokens=12)
    texts = [text for own in turns for text in own]
    assert len(set(texts)) == len(texts)


def test_an_answer_is_the_text_up_to_its_end(tmp_path, model, monkeypatch):
    tokenizer = CHAT.tokenizer

    def generated(model: Any, prompts: list[Any], **_: Any) -> list[Any]:
        ends = [[CHAT.end_id], [tokenizer.eos_token_id, *tokenizer.encode("more", add_special_tokens=False)], []]
        ids = tokenizer.encode(" <bos>It is , so\n", add_special_tokens=False)
        return [[np.asarray(ids + ends[number % 3], dtype=np.int32)] for number in range(len(prompts))]

    monkeypatch.setattr(answers, "generate", generated)
    turns = run(model, tmp_path, MT_BENCH)
    assert {text for own in turns for text in own} == {"It is , so"}


def test_questions_without_room_for_their_answers_are_refused_before_anything_is_generated(tmp_path):
    small = ignorant(max_position_embeddings=200)
    prompt = (Message("user", "What is its area?"), Message("assistant", "."), Message("user", "And twice?"))
    tokens = len(CHAT.prompt_ids(prompt))
    rows, most = MT_BENCH[1:2], (200 - tokens) // 2
    message = rf"^question 'What is its area\?': .* 200 tokens, found {tokens} of the prompt and up to {2 * most + 2} "
    with pytest.raises(UserError, match=message):
        run(small, tmp_path, rows, max_new_tokens=most + 1)
    assert not (tmp_path / "fpo.jsonl").exists()
    assert len(run(small, tmp_path, rows, 0, max_new_tokens=most)[0]) == 2
