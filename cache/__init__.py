"""The cache on disk: what stage one writes and stage two reads; nothing here imports torch.

What other programs use is listed here. A name is imported when it is first used, so that the command line answers
before pyarrow is loaded.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .reader import Cache, open_cache

__all__ = ["Cache", "open_cache"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(import_module(".reader", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
