"""Run folders: what is in one, checkpoints, resuming, stopping, metrics, provenance and model cards."""
