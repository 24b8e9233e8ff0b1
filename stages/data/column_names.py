"""Names of columns: which hold a part of the conversation, and what other people call those that are read.

In: names. Out: what they mean, and the options that would rename them.
"""

import re
from collections.abc import Collection

# Both responses, and OpenAI's names for them; their scores.
SIDES = {"chosen": "preferred_output", "rejected": "non_preferred_output"}
SCORES = ("score_chosen", "score_rejected")

# Columns that hold a part of the conversation, as `plain_name` has them; some are read, the others refused.
PARTS = {
    *("prompt", "prompts", "user_prompt", "user_message", "instruction", "instructions", "input", "inputs"),
    *("question", "questions", "query", "queries", "problem", "request", "user_input", "user_query"),
    *("history", "chat_history", "conversation_history", "dialogue_history", "dialog_history"),
    *("context", "contexts", "passage", "passages", "article", "background", "persona"),
    *("message", "messages", "conversation", "conversations", "dialog", "dialogue", "turns"),
    *("system", "system_prompt", "system_message", "system_instruction", "tools", "functions", "document", "documents"),
    *("image", "images", "video", "videos", "audio", "audios"),
}
# Words in the name of a column that is no prompt, though it holds text.
BESIDES = {
    *("id", "ids", "name", "title", "url", "date", "hash", "split", "subset", "dataset", "source", "origin", "license"),
    *("model", "models", "annotator", "judge", "score", "scores", "rating", "ratings", "rationale", "reason"),
    *("category", "type", "kind", "domain", "topic", "task", "difficulty", "language", "lang", "feedback"),
    *("label", "labels", "tag", "tags", "comment", "comments"),
}
# What other people call the columns that are read.
KNOWN_AS = {
    "chosen": (
        *("preferred", "accepted", "win", "winner", "winning", "positive", "pos", "good", "better", "best"),
        *("chosen_response", "response_chosen", "chosen_answer", "preferred_response", "accepted_response", "y_w"),
    ),
    "rejected": (
        *("dispreferred", "unpreferred", "non_preferred", "lose", "loser", "losing", "negative", "neg", "bad", "worse"),
        *("worst", "rejected_response", "response_rejected", "rejected_answer", "y_l"),
    ),
    "prompt": (
        "query",
        "problem",
        "request",
        "user_prompt",
        "user_message",
        "user_input",
        "user_query",
        "prompts",
        "post",
    ),
    "messages": ("conversation", "dialog", "dialogue", "turns", "chat"),
    "system": ("system_prompt", "system_message", "system_instruction"),
    "tools": ("functions",),
    "instruction": ("instructions",),
    "question": ("questions",),
    "history": ("chat_history", "conversation_history", "dialogue_history", "dialog_history"),
    "input": ("inputs",),
}


def plain_name(name: str) -> str:
    """A name in lower case, its words joined by underscores."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def is_no_prompt(name: str) -> bool:
    """Whether a name says that the column holds something else than the prompt."""
    return not BESIDES.isdisjoint(plain_name(name).split("_"))


def known_as(name: str, columns: Collection[str]) -> str | None:
    """The column that goes by this name, or would if it were spelled so or called as others call it."""
    if name in columns:
        return name
    names = (name, *KNOWN_AS.get(name, ()))
    return next((column for known in names for column in columns if plain_name(column) == known), None)


def suggested_name(name: str) -> str | None:
    """The name under which a column would be read, if it has another one."""
    plain = plain_name(name)
    better = next((new for new, others in KNOWN_AS.items() if plain == new or plain in others), None)
    return None if better == name else better


def option(new: str, old: str) -> str:
    """The value of `--map` that renames a column."""
    return f"{new}={old}" if re.fullmatch(r"[\w.-]+", old) else f"'{new}={old}'"


def unknown_columns(wanted: Collection[str], columns: Collection[str]) -> str:
    """What to say of columns in no known shape, of which the nearest has those that are wanted."""
    found = ", ".join(map(repr, columns))
    options = [f"--map {option(new, known_as(new, columns) or 'COLUMN')}" for new in wanted if new not in columns]
    return (
        f"found columns {found}, expected {', '.join(map(repr, wanted))}, the nearest of the shapes in docs/data.md; "
        f"rename columns with {' '.join(options)}"
    )
