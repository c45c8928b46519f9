"""Recipes: keys (names, types, ranges, effects), reading with line numbers, building TRL's configs."""
