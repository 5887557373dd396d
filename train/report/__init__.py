"""`python -m tessel.train.report`: reports on runs as self-contained HTML pages."""
