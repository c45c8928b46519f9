"""Data: where rows come from (sources), what shape they have (formats), and accepted/rejected files (pairs)."""
