"""A run on disk and while it trains: directory, checkpoints, loggers, signals, profiling."""
