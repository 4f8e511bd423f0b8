"""Multimodal retrieval from a multimodal LLM: train, evaluate, search.

>>> import rematch
>>> rematch.ReMatch
<class 'rematch.model.ReMatch'>
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rematch.errors import RematchError
    from rematch.model import ReMatch
    from rematch.search.index import Index
    from rematch.train.loss import ReMatchLoss

__version__ = "0.1.0"
__all__ = ["Index", "ReMatch", "ReMatchLoss", "RematchError"]

_HOME = {
    "ReMatch": "rematch.model",
    "ReMatchLoss": "rematch.train.loss",
    "RematchError": "rematch.errors",
    "Index": "rematch.search.index",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'rematch' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
