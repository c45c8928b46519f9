"""Held-out losses, accuracies and win rates, and the report about all stages."""
