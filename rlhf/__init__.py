"""Align language models with human preferences: SFT, reward modelling and DPO from one core to a Slurm cluster."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf.api import pack, train

__version__ = "0.1.0"
__all__ = ["__version__", "pack", "train"]


def __getattr__(name: str) -> Any:
    """`pack` and `train` are imported when they are asked for: the command line needs neither, and starts at once."""
    if name == "pack":
        from rlhf.api import pack

        return pack
    if name == "train":
        from rlhf.api import train

        return train
    raise AttributeError(f"module 'rlhf' has no attribute {name!r}")
