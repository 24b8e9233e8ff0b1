"""What a judge is asked, for each benchmark.

In: a question and the answers to it. Out: messages. The words are this project's own, written from the published
descriptions; a file can bring the benchmark's (`Template.read`). A template has a part for the system, perhaps, and one
for the user, with the fields in braces.
"""

import hashlib
import string
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from ...cache.errors import UserError
from .client import Messages

SEPARATOR = "\n---\n"


@dataclass(frozen=True)
class Template:
    """The words of a judge's task.

    Attributes:
        system: what the judge is told first; empty for nothing.
        user: the task, with fields such as `{question}` and `{answer_a}`.
    """

    system: str
    user: str

    @classmethod
    def read(cls, path: Path, *allowed: frozenset[str]) -> Self:
        """Reads a template from a file: the user's part, or the system's, a line of `---`, and the user's.

        Raises:
            UserError: there is no such file, or its fields are none of the allowed sets.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--prompt: expected a text file, found none at {path} ({error})") from error
        system, separator, user = text.rpartition(SEPARATOR)
        found = {name for _, name, _, _ in _parsed(path, user) if name is not None}
        if found not in allowed:
            raise UserError(
                f"--prompt {path}: expected the fields {' or '.join(map(_listed, allowed))}, found "
                f"{_listed(found) or 'none'}; double other braces"
            )
        return cls(system if separator else "", user)

    def messages(self, fields: Mapping[str, str]) -> Messages:
        """The messages of one judgment."""
        asked = {"role": "user", "content": self.user.format_map(fields)}
        return [{"role": "system", "content": self.system}, asked] if self.system else [asked]

    @property
    def sha256(self) -> str:
        """Hash of the words: judgments under other words are others."""
        return hashlib.sha256(f"{self.system}{SEPARATOR}{self.user}".encode()).hexdigest()


def _listed(fields: Set[str]) -> str:
    return ", ".join(f"{{{name}}}" for name in sorted(fields))


def _parsed(path: Path, text: str) -> list[tuple[str, str | None, str | None, str | None]]:
    try:
        return list(string.Formatter().parse(text))
    except ValueError as error:
        raise UserError(f"--prompt {path}: expected fields in braces, found {error}; double other braces") from error


PAIR_FIELDS = frozenset({"question", "answer_a", "answer_b"})
SCORE_FIELDS = frozenset({"conversation"})
REFERENCE_FIELDS = frozenset({"conversation", "reference"})

_PAIR = """Two assistants have answered the same request. Which answer would most people prefer: the one that does what
was asked, is correct, and is clear? Length alone is no merit.

<request>
{question}
</request>

<answer_a>
{answer_a}
</answer_a>

<answer_b>
{answer_b}
</answer_b>
"""

# One letter, so that the probability of the first token is the judge's preference.
PREFERENCE = Template("", f"{_PAIR}\nSay only A or B, and nothing else.")

FIVE_VERDICTS = Template(
    "You compare the answers of two assistants, fairly and without regard to their order or length.",
    f"""{_PAIR}
First answer the request yourself, in a few words. Then compare: point out mistakes, judge how helpful, relevant and
concise each answer is, and what it leaves out. End with one of these verdicts:

[[A>>B]] answer A is much better
[[A>B]] answer A is slightly better
[[A=B]] they are about as good
[[B>A]] answer B is slightly better
[[B>>A]] answer B is much better""",
)

_SCORE = """An assistant has had the conversation below. Grade its last answer for helpfulness, relevance, accuracy,
depth and clarity. Explain briefly, then give a grade from 1 (useless) to 10 (could not be better) in double brackets,
as [[5]].

<conversation>
{conversation}
</conversation>
"""

SCORE = Template("You grade the answers of an assistant, strictly and without regard to their length.", _SCORE)
SCORE_BY_REFERENCE = Template(
    SCORE.system,
    _SCORE
    + """
<right_answer>
{reference}
</right_answer>

Compare with the right answer, and name the mistakes before you grade.""",
)
