"""Align language models with human preferences: SFT, reward modelling and DPO from one core to a Slurm cluster."""

__version__ = "0.1.0"
