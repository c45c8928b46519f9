"""Commands about data: what is in it, what is wrong with it, what a run makes of it."""
