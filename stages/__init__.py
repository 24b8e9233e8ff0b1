"""The two stages: a frozen reference writes a cache, a policy is trained against it.

What other programs use is listed here. A name is imported when it is first used, so that the command line answers
before torch is loaded.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .model.models import find_model, load_model
    from .model.sae import load_sae
    from .model.tokenizer import load_tokenizer
    from .train.align import FPOTrainer
    from .train.config import FPOConfig

__all__ = ["FPOConfig", "FPOTrainer", "find_model", "load_model", "load_sae", "load_tokenizer"]

_HOMES = {
    "FPOConfig": ".train.config",
    "FPOTrainer": ".train.align",
    "find_model": ".model.models",
    "load_model": ".model.models",
    "load_sae": ".model.sae",
    "load_tokenizer": ".model.tokenizer",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name], __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
