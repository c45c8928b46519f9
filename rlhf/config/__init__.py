"""Recipes: their keys (names, types, ranges, effects), reading them with line numbers, and building TRL's configs."""
