"""Training: the plan of a run, the global batch, the reference, TRL's trainers and the stages."""
