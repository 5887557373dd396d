"""A clock for the verification of kernels that measures nothing: fixed times by implementation."""

MICROSECONDS = {"triton": 10.0, "eager": 30.0, "compiled": 8.0}


def clock(name, call, costs, seconds):
    call()
    return {"median_us": MICROSECONDS[name]}
