"""Whether the hub would give what is needed of it, or has given it before.

In: repositories. Out: one line for each that cannot be had, which says what to do. The hub is asked only about what is
not in the local cache, about all at once, and not for long.
"""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

# How long the hub may take to answer, for all questions together.
HUB_SECONDS = 5.0
OFFLINE_HINT = "check the network, or give a local folder"

RepoKind = Literal["model", "dataset"]


@dataclass(frozen=True)
class Repo:
    """A repository of the hub that a plan needs.

    Attributes:
        kind: as the hub tells them apart; SAEs are models.
        name: owner/name.
        part: the folder or file in it that is needed; empty for all.
    """

    kind: RepoKind
    name: str
    part: str = ""


def missing_repos(repos: Sequence[Repo]) -> list[str]:
    """Repositories that are not in the local cache and that the hub would not give."""
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

    # The hub's client would wait for ever: daemons ask, and are left behind.
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
    """Why the hub does not give a repository, and what to do; None if it does."""
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
    """Whether what is needed of a repository was fetched before."""
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
