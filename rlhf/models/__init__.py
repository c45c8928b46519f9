"""Models and tokenizers: fetch, load for training, save and load finished models."""
