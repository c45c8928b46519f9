"""Models and tokenizers: fetching, loading for training, writing and loading finished ones."""
