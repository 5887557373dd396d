"""Training loops: one engine for every task, reached as `python -m tessel.train RECIPE key=value ...`.

`schema` and `config` (what to train) -> `launch` (processes, signals, run directory) -> `tasks` with `data` and
`augment` (what a batch is and what it costs) -> `engine` (the loop) with `optim`, `parallel`, `checkpoint`, `loggers`,
`perf`.
"""
