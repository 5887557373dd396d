"""OpenMMLab: its packages made to run on current torch, and tessel's backbones registered for them."""
