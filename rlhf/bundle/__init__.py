"""A recipe with all that it needs in one file, for a machine without a network."""
