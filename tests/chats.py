"""Chat formats of the four kinds, and conversations for them."""

from fpo.stages.data.chat import ChatFormat, Example, Message, Text, Turns
from hypothesis import strategies as st
from tiny_tokenizers import chatml, gemma

BARE = (
    "{% for m in messages %}{{ m['role'] + ':\n' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"
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
