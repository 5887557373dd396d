"""`tessel report`: reports on runs as self-contained HTML pages."""
