"""FPO: feature-level constrained preference optimization, in two offline stages.

What is listed here is what a program takes from the package. It is imported when it is first used, so that `import fpo`
takes no time. The file is installed as `fpo/__init__.py`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fpo.cache.reader import Cache, open_cache
    from fpo.stages.align import FPOConfig, FPOTrainer
    from fpo.stages.models import find_model, load_model, load_tokenizer
    from fpo.stages.sites import load_sae

__all__ = [
    "Cache",
    "FPOConfig",
    "FPOTrainer",
    "__version__",
    "find_model",
    "load_model",
    "load_sae",
    "load_tokenizer",
    "open_cache",
]

_MODULES = {
    "cache.reader": ("Cache", "open_cache"),
    "stages.align": ("FPOConfig", "FPOTrainer"),
    "stages.models": ("find_model", "load_model", "load_tokenizer"),
    "stages.sites": ("load_sae",),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}

__version__: str


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("importlib.metadata").version(__name__)
    if name not in _HOMES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
