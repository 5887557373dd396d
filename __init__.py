"""tessel: a zoo of vision backbones built from shared token mixers.

`import tessel.zoo` registers the models with timm; `python -m tessel.train` trains them.
Subpackages, each imports only those before it: `tessel.kernels`, `tessel.blocks`, `tessel.zoo`, `tessel.train`.
`tessel.checkpoints` holds the manifest of published weights.
"""

__version__ = "0.2.0.dev0"
