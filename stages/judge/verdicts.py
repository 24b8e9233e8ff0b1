"""What a judge's reply says, by the rules of each benchmark.

In: a reply. Out: a preference or a score, or None where the reply holds no verdict; that is counted, never a tie.
"""

import math
import re

from .client import Reply

# Arena-Hard's five verdicts, as the preference for answer A and the weight of the battle (Li et al. 2024).
FIVE = {"A>>B": (1.0, 3), "A>B": (1.0, 1), "A=B": (0.5, 1), "B>A": (0.0, 1), "B>>A": (0.0, 3)}


def preference_by_logprobs(reply: Reply) -> float | None:
    """The judge's probability of A against B at the first position that holds one of them among its likeliest tokens.

    AlpacaEval 2's weighted preference (Dubois et al. 2024). A token that is missing from the list has at most the
    probability of the last one there; it counts as none.
    """
    for likeliest in reply.positions:
        found = {"A": 0.0, "B": 0.0}
        for token, logp in likeliest.items():
            if (name := token.strip()) in found:
                found[name] += math.exp(logp)
        if total := found["A"] + found["B"]:
            return found["A"] / total
    return None


def preference_by_text(text: str) -> float | None:
    """1 for A, 0 for B; None for anything else.

    The reply has that letter in double brackets, and not the other one; or it begins with the letter and a mark or line
    end after it (`A: …`), and does not name the other one.
    """
    bracketed = re.findall(r"\[\[\s*(A|B)\s*\]\]", text)
    if bracketed:
        return None if len(set(bracketed)) > 1 else float(bracketed[0] == "A")
    leading = re.match(r"\W*(?:Answer\s+)?(A|B)(?=[:.,;)*\n]|\W*$)", text)
    if leading is None or len(set(re.findall(r"\b(A|B)\b", text))) > 1:
        return None
    return float(leading[1] == "A")


def verdict_of_five(text: str) -> str | None:
    """Arena-Hard's verdict: the last one in double brackets, as `[[A>>B]]`."""
    found = re.findall(r"\[\[\s*(A>>B|A>B|A=B|B>A|B>>A)\s*\]\]", text)
    return found[-1] if found else None


def score_of_ten(text: str) -> float | None:
    """MT-Bench's score from 1 to 10: the first number in double brackets."""
    found = re.search(r"\[\[\s*(\d+(?:\.\d+)?)\s*\]\]", text)
    return float(found[1]) if found and 1 <= float(found[1]) <= 10 else None
