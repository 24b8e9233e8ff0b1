import gc
import signal
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# A shell that starts the tests in its background has them ignore Ctrl-C, and with them all that they start and stop.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="tries of tests/reliability as `make reliability` makes them")
    parser.addoption("--write-results", action="store_true", help="tests/compatibility writes results/compatibility.md")


# Folders whose tests start processes and train models by the dozen.
SLOW_FOLDERS = {"reliability", "seams"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of these folders are slow, as those are that say so themselves."""
    for item in items:
        if item.path.parent.name in SLOW_FOLDERS:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def tries(pytestconfig: pytest.Config) -> Callable[[int, int], int]:
    """How often to try something: `tries(a few, many)`, many under `--long`."""
    return lambda few, many: many if pytestconfig.getoption("long") else few


@pytest.fixture
def tally(record_property: Callable[[str, Any], None]) -> Callable[..., None]:
    """Adds to a figure of `make reliability`: `tally("kills of stage one survived", 12)`, added up over all tests."""
    return lambda what, number=1: record_property("tally", [what, number])


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Prints the figures that were tallied, after the tests that gave them passed."""
    figures: Counter[str] = Counter()
    for report in terminalreporter.stats.get("passed", []):
        for name, value in report.user_properties:
            if name == "tally":
                figures[value[0]] += value[1]
    if figures:
        terminalreporter.section("figures")
    for what in sorted(figures):
        terminalreporter.line(f"{figures[what]:>12,}  {what}")


@pytest.fixture(scope="session", autouse=True)
def user_folder_of_the_tests(tmp_path_factory):
    """What the program remembers between runs (hashes, decoded caches) stays out of the developer's home."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FPO_HOME", str(tmp_path_factory.mktemp("fpo_home")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Any:
    """The `World` of tiny_world.py, which is imported here alone: it takes torch, and some tests do without."""
    from tiny_world import make_world

    world = make_world(tmp_path_factory.mktemp("world"))
    gc.freeze()  # the Trainer collects garbage whenever it starts; what is imported by now is none
    return world


@pytest.fixture(scope="session")
def s3() -> Iterator[Any]:
    """An S3 server on this machine, the account for it in the environment, and its client."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "nobody")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        yield boto3.client("s3")
    server.stop()


@pytest.fixture
def url(s3) -> str:
    """A cache's URL in a bucket of its own."""
    bucket = f"bucket-{uuid.uuid4().hex}"
    s3.create_bucket(Bucket=bucket)
    return f"s3://{bucket}/caches/uf"


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Goes to a machine of that name, which has a user folder of its own."""

    def move(name: str) -> None:
        monkeypatch.setenv("FPO_HOME", str(tmp_path / "machines" / name))

    move("first")
    return move
