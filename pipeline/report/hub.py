"""Whether hub repositories can be downloaded, or are in the local cache already.

In: repositories. Out: one line for each that is unavailable, which says what to do. The hub is asked only about
repositories that are not in the local cache, about all at the same time, and for a few seconds at most.
"""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

# Seconds that the hub may take to answer all questions together.
HUB_SECONDS = 5.0
OFFLINE_HINT = "check the network, or give a local folder"

RepoKind = Literal["model", "dataset"]


@dataclass(frozen=True)
class Repo:
    """A repository of the hub that a plan needs.

    Attributes:
        kind: the hub's kind of repository; SAEs lie in those of models.
        name: `owner/name`.
        part: the folder or file that is needed; empty for the whole repository.
    """

    kind: RepoKind
    name: str
    part: str = ""


def missing_repos(repos: Sequence[Repo]) -> list[str]:
    """One line for each repository that is neither in the local cache nor available from the hub."""
    from huggingface_hub import is_offline_mode

    wanted = dict.fromkeys((repo.kind, repo.name) for repo in repos if not in_local_cache(repo))
    if is_offline_mode():
        return [
            f"{kind} {name}: not in the local cache, and HF_HUB_OFFLINE is set; unset it, or give a local folder"
            for kind, name in wanted
        ]
    answers: dict[tuple[RepoKind, str], str | None] = {}

    def ask(kind: RepoKind, name: str) -> None:
        answers[kind, name] = refusal(kind, name)

    # The hub's client has no overall time limit, so daemon threads ask; those without an answer in time are abandoned.
    threads = [threading.Thread(target=ask, args=repo, daemon=True) for repo in wanted]
    for thread in threads:
        thread.start()
    until = time.monotonic() + HUB_SECONDS
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))
    silent = f"not in the local cache, and the hub did not answer within {HUB_SECONDS:g} s; {OFFLINE_HINT}"
    found = {repo: answers.get(repo, silent) for repo in wanted}
    return [f"{kind} {name}: {reason}" for (kind, name), reason in found.items() if reason is not None]


def refusal(kind: RepoKind, name: str) -> str | None:
    """Why the hub refuses a repository, and what to do; None if it does not refuse."""
    from huggingface_hub import auth_check
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{name}"
    try:
        auth_check(name, repo_type=kind)
    except GatedRepoError:
        return f"its licence has not been accepted; accept it at {page}, then log in with `hf auth login`"
    except RepositoryNotFoundError:
        return "the hub has none of that name, or it is private; correct the name, or log in with `hf auth login`"
    except HfHubHTTPError as error:
        return f"the hub refuses it ({str(error).splitlines()[0]}); look at {page}"
    except Exception as error:  # noqa: BLE001 (what the hub's client raises without a network has no public class)
        return f"not in the local cache, and the hub does not answer ({str(error)[:80]}); {OFFLINE_HINT}"
    return None


def in_local_cache(repo: Repo) -> bool:
    """Whether the needed part of a repository is in the local cache."""
    if repo.kind == "dataset":
        from datasets import config
        from datasets.naming import camelcase_to_snakecase

        *owner, name = repo.name.split("/")
        folder = Path(config.HF_DATASETS_CACHE) / "___".join([*owner, camelcase_to_snakecase(name)])
        return any(path.is_dir() for path in folder.glob("*/*/*"))
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(repo.name, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        return False
    if repo.part:
        return (folder / repo.part).exists()
    return (folder / "config.json").exists() and any(folder.glob("*.safetensors"))
