"""Align language models with human preferences: SFT, reward modelling and DPO from one core to a Slurm cluster."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf.api import pack, train
    from rlhf.inference.python import generate, label, score

__version__ = "0.1.0"
__all__ = ["__version__", "generate", "label", "pack", "score", "train"]


def __getattr__(name: str) -> Any:
    """Functions are imported when they are asked for: the command line needs none of them, and starts at once."""
    if name in ("pack", "train"):
        from rlhf import api

        return getattr(api, name)
    if name in ("generate", "label", "score"):
        from rlhf.inference import python

        return getattr(python, name)
    raise AttributeError(f"module 'rlhf' has no attribute {name!r}")
