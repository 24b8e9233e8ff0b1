"""Where the prompt ends and the responses begin.

In: a prompt and two responses, of which the responses may say the prompt once more, or alone. Out: what both sides
share, and what follows it on either side; the last turn that they share is the boundary.
"""

import re

from .chat import Message, Text, Turns


def join(prompt: Text, chosen: Text, rejected: Text) -> tuple[Turns, Turns, Turns]:
    """A conversation of turns, of which some parts may be text.

    Raises:
        ValueError: a side neither follows the prompt nor begins with it.
    """
    sides = [_answer(side) for side in (chosen, rejected)]
    if isinstance(prompt, tuple):
        return split_turns(*(_after(prompt, side) for side in sides))
    if prompt.strip() and all(side[0].role == "assistant" for side in sides if side):
        return join((Message("user", prompt),), *sides)
    for side in filter(None, sides):
        if not any(bare(prompt) in bare(message.content) for message in side):
            raise ValueError(
                f"expected the text of the prompt among the turns of both sides, which begin with {side[0].role!r}, "
                "found it in none; leave one of the two out"
            )
    return split_turns(*sides)


def before(told: Turns, chosen: Text, rejected: Text) -> Turns:
    """What was said before both sides, of a conversation that may hold the chosen one too.

    Raises:
        ValueError: it ends with another answer.
    """
    answer = _answer(chosen)
    if told == answer:
        return ()  # both sides say it all
    if answer and told[-len(answer) :] == answer:
        return told[: -len(answer)]
    alone = all(side[0].role == "assistant" for side in map(_answer, (chosen, rejected)) if side)
    if alone and told and told[-1].role == "assistant":
        raise ValueError("expected a conversation that both sides answer, found one whose last turn is another answer")
    return told


def bare(text: str) -> str:
    """A text without what data sets change in one of two copies: case, white space and punctuation."""
    letters = "".join(filter(str.isalnum, text.casefold()))
    return letters or " ".join(text.split())


def split_turns(chosen: Turns, rejected: Turns) -> tuple[Turns, Turns, Turns]:
    """Shared turns, and what follows them on either side."""
    shorter, longer = sorted((chosen, rejected), key=len)
    if longer[: len(shorter)] == shorter:
        # One side is the other's beginning, or equal to it: what can differ is the last answer alone.
        shared = len(longer) - (bool(longer) and longer[-1].role == "assistant")
    else:
        shared = next(i for i in range(len(shorter)) if chosen[i] != rejected[i])
    return longer[:shared], chosen[shared:], rejected[shared:]


def _answer(side: Text) -> Turns:
    if isinstance(side, tuple):
        return side
    return (Message("assistant", side),) if side else ()


def _after(prompt: Turns, side: Turns) -> Turns:
    """The conversation of one side, which may begin with the prompt; a system turn may be in one of them alone."""
    if side[: len(prompt)] == prompt:
        return side
    first, rest = prompt[:1], prompt[1:]
    if first[0].role == "system" and rest and side[: len(rest)] == rest:
        return first + side
    if side and side[0].role == "system" and side[1 : 1 + len(prompt)] == prompt:
        return side
    if side and prompt[-1].role == "user" and side[0].role in ("user", "system"):
        raise ValueError(f"expected an answer to the prompt or the prompt itself, found a turn of {side[0].role!r}")
    return prompt + side


# Text.


def common_beginning(chosen: str, rejected: str) -> tuple[str, str, str]:
    """The longest common beginning of two texts, and what follows it on either side.

    As TRL does: a space at its end belongs to the responses.
    """
    shorter = min(len(chosen), len(rejected))
    shared = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), shorter)
    if chosen == rejected:
        shared = 0
    elif 0 < shared < shorter and chosen[shared - 1] == " ":
        shared -= 1
    return chosen[:shared], chosen[shared:], rejected[shared:]


def split_dialogues(prompt: str, chosen: str, rejected: str) -> tuple[Turns, Turns, Turns] | None:
    """The turns of Anthropic-HH dialogues: both sides, or the prompt alone; None for other texts.

    Raises:
        ValueError: both sides are dialogues, and the prompt is no part of them.
    """
    sides = [side for side in (chosen, rejected) if side]
    if sides and all(map(_is_dialogue, sides)):
        if not all(bare(prompt) in bare(side) for side in sides):
            raise ValueError(
                "expected the text of 'prompt' in the dialogues of 'chosen' and 'rejected', found other text"
            )
        return split_turns(_parse_dialogue(chosen), _parse_dialogue(rejected))
    if not _is_dialogue(prompt):
        return None
    turns = _parse_dialogue(prompt)
    opened = turns[-1] == Message("assistant", "")
    answers = [(Message("assistant", side.strip()),) for side in (chosen, rejected)]
    return turns[:-1] if opened else turns, answers[0], answers[1]


def _is_dialogue(text: str) -> bool:
    return text.lstrip().startswith("Human:") and "\n\nAssistant:" in text


def _parse_dialogue(text: str) -> Turns:
    """The turns of a dialogue, in the roles' usual names; contents lose white space at both ends."""
    roles = {"Human": "user", "Assistant": "assistant"}
    _, *parts = re.split(r"(?:^\s*|\n\n)(Human|Assistant):", text)
    return tuple(Message(roles[name], content.strip()) for name, content in zip(parts[::2], parts[1::2], strict=True))
