"""The trainer under torchrun, whose first start loses a process: `torchrun tests/mortal.py RANK:STEP RECIPE ...`."""

import os
import sys

import ranks
import torch

torch.set_num_threads(1)
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    ranks.mortal(sys.argv[1])(int(os.environ["RANK"]))
sys.exit(ranks.__main__.main(sys.argv[2:]))
