"""The trainer under torchrun; in the first start, rank RANK is killed at step STEP, and torchrun must restart.

Usage: torchrun tests/mortal.py RANK:STEP RECIPE [key=value ...]
"""

import os
import sys

import ranks
import torch

torch.set_num_threads(1)
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    ranks.send_signal_at(sys.argv[1])(int(os.environ["RANK"]))
sys.exit(ranks.__main__.main(sys.argv[2:]))
