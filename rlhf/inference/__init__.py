"""Finished models at work: answers, scores, chat."""
