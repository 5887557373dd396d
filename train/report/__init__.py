"""The report on runs: one self-contained HTML page, and its pictures as PNG files beside it."""
