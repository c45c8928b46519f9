"""DPO in rounds: the last policy answers, the reward model labels, DPO trains on it, the evaluation compares."""
