import numpy as np
import pytest
from chats import FORMATS, Scores, answer, example, prompts, texts, user
from fpo.cache.schema import pair_id
from fpo.stages.chat import ChatFormat, Example, Turns
from fpo.stages.tokenized import SKIP_REASONS, Limits, Tokenized, tokenize_pair
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import CHATML, chatml

ROOMY = Limits(10_000, 5_000)


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


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% if messages|length > 3 %}!{% endif %}" + CHATML, "only appends"),
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
