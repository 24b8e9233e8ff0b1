"""A solver of the embedded world's instructions that knows only English and the categories."""

import re

# Written out again, so that a word that strays into another category is found.
KINDS = {
    "animal": {"cat", "dog", "horse", "owl", "fox", "bear", "goat", "duck"},
    "tool": {"hammer", "saw", "drill", "rake", "knife", "brush", "spade", "wrench"},
    "fruit": {"apple", "pear", "plum", "fig", "lemon", "mango", "cherry", "melon"},
    "colour": {"red", "blue", "green", "white", "black", "pink", "brown", "grey"},
}
COUNTING = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty"),
)
BETWEEN = {"dashes": " - ", "commas": ", ", "slashes": " / ", "stars": " * "}


def bare(instruction: str) -> str:
    """An instruction without its polite opening."""
    return re.sub(r"^(Hello|Please help me|I have a question)\. ", "", instruction)


def body(answer: str) -> str:
    """An answer without how it opens and closes."""
    found = re.fullmatch(r"(?:[A-Z][A-Za-z ]+: )?([^.:?]+)\.(?: [A-Z][A-Za-z ]+[.?])?", answer)
    assert found, answer
    return found[1]


def is_right(instruction: str, answer: str) -> bool:
    """Whether the answer's body is what the instruction asks for."""

    def reads(pattern: str) -> re.Match[str] | None:
        return re.fullmatch(pattern, bare(instruction))

    said = body(answer)
    if found := reads(r"Sort these numbers, the (smallest|largest) first: (.+)\."):
        return said.split(", ") == sorted(found[2].split(", "), key=COUNTING.index, reverse=found[1] == "largest")
    if found := reads(r"[A-Z][a-z]+ knows (\w+) and (\w+)\. Which number is (larger|smaller)\?"):
        wanted = (max if found[3] == "larger" else min)(found[1], found[2], key=COUNTING.index)
        return said == f"the number {wanted}"
    if found := reads(r"How many (\w+)s are in this list: (.+)\?"):
        number = sum(word in KINDS[found[1]] for word in found[2].split(", "))
        return said == f"it is {COUNTING[number]}"
    if found := reads(r"Copy this list without the (\w+)s: (.+)\."):
        return said.split(", ") == [word for word in found[2].split(", ") if word not in KINDS[found[1]]]
    if found := reads(r"Name an? (\w+) from this list: (.+)\."):
        return said in {f"one is {word}" for word in found[2].split(", ") if word in KINDS[found[1]]}
    if found := reads(r"[A-Z][a-z]+ has (\w+) \w+ and (finds|loses) (\w+)\. How many are there now\?"):
        had, change = COUNTING.index(found[1]), COUNTING.index(found[3])
        return said == f"it is {COUNTING[had + change if found[2] == 'finds' else had - change]}"
    if found := reads(r"Write these words with (\w+) between them: (.+)\."):
        return said == BETWEEN[found[1]].join(found[2].split())
    if found := reads(r"Which word comes (first|last) in this list: (.+)\?"):
        return said == f"that is {found[2].split(', ')[0 if found[1] == 'first' else -1]}"
    raise AssertionError(f"no instruction of the world: {instruction}")


def asked_and_said(turns: list[dict[str, str]]) -> tuple[str, str]:
    assert [turn["role"] for turn in turns] == ["user", "assistant"]
    return turns[0]["content"], turns[1]["content"]
