"""Data: sources of rows, their formats, checks, and the accepted/rejected files of `rlhf pairs`."""
