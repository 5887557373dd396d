"""Checking and timing the Triton kernels on this machine: `python -m tessel.kernels verify`."""
