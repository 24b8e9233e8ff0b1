"""Data sets of the hub, and how soon it is known that one cannot be had.

In: a name. Out: the rows of a split, from the hub or from the local cache, or one line that says why there are none.
"""

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import datasets
import huggingface_hub
from huggingface_hub import constants, get_session

# How long the hub may take to answer whether it is there, seconds.
PROBE_SECONDS = 2.0
HUB_ID = re.compile(r"(?:[\w.-]+/)?[\w.-]+", re.ASCII)


def may_be_hub_id(name: str) -> bool:
    """Whether a name could be that of a data set on the hub (`owner/name`, or one of the old ones without an owner)."""
    return len(name) <= 96 and HUB_ID.fullmatch(name) is not None and not name.startswith((".", "-", "~"))


def load_from_hub(name: str, split: str, config: str | None) -> datasets.Dataset:
    """A split of a data set that is on the hub, or was fetched from it before.

    Raises:
        FileNotFoundError: the hub has no such data set, or cannot be reached and it was not fetched before.
        ValueError: it has no such split or configuration.
    """
    fault = unreachable()
    try:
        with _offline() if fault else nullcontext():
            return datasets.load_dataset(name, config, split=split)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"found no local file or folder and no hub data set {name!r}") from error
    except ConnectionError as error:
        raise FileNotFoundError(
            f"found no local file or folder {name!r}, and no data set of that name could be fetched from the hub "
            f"({fault or error}); correct the path, or check the network"
        ) from error
    except ValueError as error:  # an unknown split or configuration: the library's message, on one line
        raise ValueError(f"hub data set {name!r}: {' '.join(str(error).split())}") from error


def unreachable() -> str | None:
    """Why the hub cannot be reached, known within `PROBE_SECONDS`; None if it answers, whatever it says."""
    if huggingface_hub.is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    faults: list[str | None] = []

    def ask() -> None:
        try:
            get_session().head(constants.ENDPOINT, timeout=PROBE_SECONDS)
        except Exception as error:  # noqa: BLE001 (what the hub's client raises without a network has no public class)
            faults.append(f"{constants.ENDPOINT} does not answer: {' '.join(str(error).split())[:80]}")
        else:
            faults.append(None)

    # Looking up a host's name has no time limit of its own: a daemon asks, and is left behind.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    return faults[0] if faults else f"{constants.ENDPOINT} did not answer within {PROBE_SECONDS:g} s"


@contextmanager
def _offline() -> Iterator[None]:
    """The libraries look into the local cache alone: they would ask again and again, for half a minute."""
    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before
