"""Processes: the process group, rendezvous, and data parallelism by DDP or FSDP2."""
