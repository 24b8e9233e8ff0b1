"""A solver of the embedded world's instructions that knows only English and the categories."""

import re

# Written out again, so that a word that strays into another category is found.
KINDS = {
    "animal": {"cat", "dog", "horse", "owl", "fox", "bear"},
    "tool": {"hammer", "saw", "drill", "rake", "knife", "brush"},
    "fruit": {"apple", "pear", "plum", "fig", "lemon", "melon"},
    "colour": {"red", "blue", "green", "white", "black", "pink"},
}
COUNTING = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty"),
)
BETWEEN = {"dashes": " - ", "commas": ", ", "slashes": " / ", "stars": " * "}


def body(answer: str) -> str:
    """An answer without how it opens and closes."""
    found = re.fullmatch(r"(?:[A-Z][A-Za-z ]+: )?([^.:?]+)\.(?: [A-Z][A-Za-z ]+[.?])?", answer)
    assert found, answer
    return found[1]


def is_right(instruction: str, answer: str) -> bool:
    """Whether the answer's body is what the instruction asks for."""

    def reads(pattern: str) -> re.Match[str] | None:
        return re.fullmatch(pattern, instruction)

    said = body(answer)
    if found := reads(r"Sort (upwards|downwards): (.+)\."):
        return said.split(", ") == sorted(found[2].split(", "), key=COUNTING.index, reverse=found[1] == "downwards")
    if found := reads(r"Which is the (smallest|largest): (.+)\?"):
        wanted = (min if found[1] == "smallest" else max)(found[2].split(", "), key=COUNTING.index)
        return said == f"it is {wanted}"
    if found := reads(r"How many (\w+)s: (.+)\?"):
        number = sum(word in KINDS[found[1]] for word in found[2].split(", "))
        return said == f"it is {COUNTING[number]}"
    if found := reads(r"Leave out the (first|last): (.+)\."):
        gone = found[2].split(", ")[0 if found[1] == "first" else -1]
        return said.split(", ") == [word for word in found[2].split(", ") if word != gone]
    if found := reads(r"Pick one of the (\w+)s: (.+)\."):
        return said in {f"it is {word}" for word in found[2].split(", ") if word in KINDS[found[1]]}
    if found := reads(r"Write with (\w+): (.+)\."):
        return said == BETWEEN[found[1]].join(found[2].split())
    if found := reads(r"Which is (first|last): (.+)\?"):
        return said == f"it is {found[2].split(', ')[0 if found[1] == 'first' else -1]}"
    if found := reads(r"Read (forwards|backwards): (.+)\."):
        return said.split(", ") == found[2].split(", ")[:: 1 if found[1] == "forwards" else -1]
    raise AssertionError(f"no instruction of the world: {instruction}")


def problem(instruction: str) -> tuple[str, ...]:
    """What an instruction is about, whichever way it is asked: its kind, and its words in alphabetical order."""
    asked, _, listed = instruction[:-1].partition(": ")
    turns = r"upwards|downwards|smallest|largest|first|last|forwards|backwards|" + "|".join(
        [*BETWEEN, *(f"{kind}s" for kind in KINDS)]
    )
    kind = re.sub(rf"\b({turns})\b", "…", asked)
    if kind == "Which is …":  # a place in a list, against "Which is the …" of numbers
        kind = "place"
    return kind, *sorted(re.findall(r"\w+", listed))


def asked_and_said(turns: list[dict[str, str]]) -> tuple[str, str]:
    assert [turn["role"] for turn in turns] == ["user", "assistant"]
    return turns[0]["content"], turns[1]["content"]
