"""The packaged ImageNet recipes: the published settings, the whole optimizer and schedule, and two steps of each."""

import math
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import timm
import torch
import trainer

import tessel.zoo
from tessel.checkpoints import load_manifest
from tessel.train.optim.optimizer import build_optimizer
from tessel.train.recipe.load import PACKAGED, load_recipe
from tessel.train.recipe.plan import plan

IMAGENET = 1_281_167  # training images
RECIPES = sorted(path.stem for path in (PACKAGED / "imagenet").glob("*.yaml"))
PAGE_SCRIPT = Path(tessel.zoo.__file__).parent.parent / "docs" / "recipes.py"
FAMILIES = {name: family for family in tessel.zoo.list_families() for name in family.variants}

# written down a second time, from the fact sheets: size, batch, epochs, warm-up, peak lr, last lr, weight decay, drop
# path, clip, moving average, copies of an image, published top-1 (None: not known to us)
FACTS = {
    "affnet_extra_tiny": (256, 1024, 300, 15.985, 9e-3, 9e-4, 0.008, None, None, 0.9995, 1, 73.0),
    "affnet_tiny": (256, 1024, 300, 15.985, 9e-3, 9e-4, 0.008, None, None, 0.9995, 1, 77.0),
    "affnet_base": (256, 1024, 300, 15.985, 9e-3, 9e-4, 0.008, None, None, 0.9995, 1, 79.8),
    "agent_deit_tiny": (224, 4096, 300, 20, 4e-3, 4e-5, 0.05, 0.0, 5.0, None, 1, 74.9),
    "agent_deit_small": (224, 1024, 300, 20, 1e-3, 1e-5, 0.05, 0.1, 5.0, None, 1, 80.5),
    "agent_deit_small_448": (448, 512, 300, 20, 5e-4, 5e-6, 0.05, 0.1, 5.0, None, 1, 83.1),
    "agent_deit_base": (224, 1024, 300, 20, 1e-3, 1e-5, 0.05, 0.3, 5.0, None, 1, 82.0),
    "agent_pvt_tiny": (224, 1024, 310, 5, 1e-3, 2e-5, 0.05, 0.1, None, None, 1, 78.4),
    "agent_pvt_small": (224, 1024, 310, 5, 1e-3, 2e-5, 0.05, 0.1, None, None, 1, 82.2),
    "agent_pvt_medium": (224, 1024, 310, 5, 1e-3, 2e-5, 0.05, 0.3, 1.0, None, 1, 83.4),
    "agent_pvt_medium_256": (256, 512, 310, 5, 5e-4, 1e-5, 0.05, 0.3, 1.0, None, 1, 83.8),
    "agent_pvt_large": (224, 512, 310, 5, 5e-4, 1e-5, 0.05, 0.3, 1.0, None, 1, 83.7),
    "agent_swin_tiny": (224, 1024, 300, 20, 1e-3, 1e-5, 0.05, 0.2, 5.0, None, 1, 82.6),
    "agent_swin_small": (224, 1024, 300, 20, 1e-3, 1e-5, 0.05, 0.3, 5.0, None, 1, 83.7),
    "agent_swin_small_288": (288, 512, 300, 20, 5e-4, 5e-6, 0.05, 0.3, 5.0, None, 1, 84.1),
    "agent_swin_base": (224, 512, 300, 20, 5e-4, 5e-6, 0.05, 0.5, 5.0, None, 1, 84.0),
    "agent_swin_base_384": (384, 256, 30, 5, 1e-5, 1e-7, 1e-8, 0.5, 5.0, None, 1, 84.9),
    "agent_cswin_tiny": (224, 1024, 310, 20, 1e-3, 2e-5, 0.05, 0.2, None, 0.99984, 1, 83.1),
    "agent_cswin_small": (224, 1024, 310, 20, 1e-3, 2e-5, 0.05, 0.4, None, 0.99984, 1, 83.9),
    "agent_cswin_base": (224, 512, 310, 20, 5e-4, 1e-5, 0.1, 0.5, None, 0.99992, 1, 84.7),
    "agent_cswin_base_384": (384, 256, 30, 0, 2.5e-6, 2.5e-7, 1e-8, 0.7, None, 0.9998, 1, 85.8),
    "attnet_xxs": (224, 4096, 300, 5, 4e-3, 1e-6, 0.015, 0.0, None, 0.99995, 3, None),
    "attnet_xs": (224, 4096, 300, 5, 4e-3, 1e-6, 0.025, 0.02, None, 0.99995, 3, None),
    "attnet_s": (224, 4096, 300, 5, 4e-3, 1e-6, 0.025, 0.05, None, 0.99995, 3, None),
    "attnet_t1": (224, 4096, 300, 5, 4e-3, 1e-6, 0.025, 0.1, None, 0.99995, 3, None),
    "attnet_t2": (224, 4096, 300, 5, 4e-3, 1e-6, 0.05, 0.2, None, 0.99995, 3, 84.4),
    "attnet_t3": (224, 4096, 300, 5, 4e-3, 1e-6, 0.05, 0.4, None, 0.99995, 3, None),
    "attnet_t4": (224, 4096, 300, 5, 4e-3, 1e-6, 0.05, 0.5, None, 0.99995, 3, None),
    "biformer_tiny": (224, 1024, 300, 5, 1e-3, 1e-5, 0.05, 0.1, None, None, 3, 81.4),
    "biformer_small": (224, 1024, 300, 5, 1e-3, 1e-5, 0.05, 0.15, None, None, 3, 83.8),
    "biformer_base": (224, 1024, 300, 5, 1e-3, 1e-5, 0.05, 0.4, None, None, 3, 84.3),
    "biformer_stl_tiny": (224, 1024, 300, 5, 1e-3, 1e-5, 0.05, 0.1, None, None, 3, 82.7),
    "biformer_stl_tiny_nchw": (224, 1024, 300, 5, 1e-3, 1e-5, 0.05, 0.1, None, None, 3, 82.7),
    "crossformer_tiny": (224, 1024, 300, 20, 1e-3, 1e-5, 0.05, 0.1, 5.0, None, 1, 81.5),
    "crossformer_small": (224, 1024, 300, 20, 1e-3, 1e-5, 0.05, 0.2, 5.0, None, 1, 82.5),
    "crossformer_base": (224, 1024, 300, 20, 1e-3, 1e-5, 0.05, 0.3, 5.0, None, 1, 83.4),
    "crossformer_large": (224, 1024, 300, 20, 1e-3, 1e-5, 0.05, 0.5, 5.0, None, 1, 84.0),
    "crossformer_pp_small": (224, 1024, 300, 20, 1e-3, 1e-5, 0.05, 0.2, 5.0, None, 1, 83.2),
    "crossformer_pp_base": (224, 1024, 300, 20, 1e-3, 1e-5, 0.05, 0.3, 5.0, None, 1, 84.2),
    "crossformer_pp_large": (224, 1024, 300, 20, 1e-3, 1e-5, 0.05, 0.5, 5.0, None, 1, 84.7),
    "crossformer_pp_huge": (224, 1024, 300, 20, 1e-3, 1e-5, 0.05, 0.5, 5.0, None, 1, 84.9),
    "cswin_tiny": (224, 2048, 310, 20, 2e-3, 1e-5, 0.05, 0.2, None, 0.99984, 1, 82.8),
    "cswin_small": (224, 2048, 310, 20, 2e-3, 1e-5, 0.05, 0.4, None, 0.99984, 1, 83.6),
    "cswin_base": (224, 1024, 310, 20, 1e-3, 1e-5, 0.1, 0.5, None, 0.99992, 1, 84.2),
    "cswin_base_384": (384, 256, 30, 0, 5e-6, 5e-7, 1e-8, 0.7, None, 0.9998, 1, 85.5),
    "cswin_large": (224, 512, 40, 0, 2.5e-4, 5e-7, 1e-8, 0.2, None, 0.9996, 1, 86.5),
    "cswin_large_384": (384, 512, 40, 0, 2.5e-4, 5e-7, 1e-8, 0.2, None, 0.9996, 1, 87.5),
    "inline_deit_tiny": (224, 4096, 300, 20, 4e-3, 4e-5, 0.05, 0.1, 5.0, None, 1, 74.5),
    "inline_deit_small": (288, 1024, 300, 20, 1e-3, 1e-5, 0.05, 0.1, 5.0, None, 1, 80.2),
    "inline_deit_base": (448, 512, 300, 20, 5e-4, 5e-6, 0.05, 0.1, 5.0, None, 1, 82.3),
    "inline_pvt_tiny": (224, 1024, 310, 5, 1e-3, 2e-5, 0.05, 0.1, None, None, 1, 78.2),
    "inline_pvt_small": (224, 1024, 310, 5, 1e-3, 2e-5, 0.05, 0.1, None, None, 1, 82.0),
    "inline_pvt_medium": (224, 1024, 310, 5, 1e-3, 2e-5, 0.05, 0.3, 1.0, None, 1, 83.2),
    "inline_pvt_large": (224, 512, 310, 5, 5e-4, 1e-5, 0.05, 0.3, 1.0, None, 1, 83.6),
    "inline_swin_tiny": (224, 1024, 300, 20, 1e-3, 1e-5, 0.05, 0.2, 5.0, None, 1, 82.4),
    "inline_swin_small": (224, 1024, 300, 20, 1e-3, 1e-5, 0.05, 0.3, 5.0, None, 1, 83.6),
    "inline_swin_base": (224, 512, 300, 20, 5e-4, 5e-6, 0.05, 0.5, 5.0, None, 1, 84.1),
    "inline_swin_base_384": (384, 256, 30, 5, 1e-5, 1e-7, 1e-8, 0.5, 5.0, None, 1, None),
    "inline_cswin_tiny": (224, 1024, 310, 20, 1e-3, 2e-5, 0.05, 0.2, None, 0.9999, 1, 83.2),
    "inline_cswin_small": (224, 1024, 310, 20, 1e-3, 2e-5, 0.05, 0.4, None, 0.9999, 1, 83.8),
    "inline_cswin_base": (224, 512, 310, 20, 5e-4, 1e-5, 0.1, 0.5, None, 0.99995, 1, 84.5),
    "inline_cswin_base_384": (384, 256, 30, 0, 2.5e-6, 2.5e-7, 1e-8, 0.7, None, 0.999975, 1, 85.7),
    "l2vit_tiny": (224, 4096, 300, 20, 4e-3, 1e-6, 0.05, 0.1, None, 0.9999, 1, 83.1),
    "l2vit_small": (224, 4096, 300, 20, 4e-3, 1e-6, 0.05, 0.2, None, 0.9999, 1, 84.1),
    "l2vit_base": (224, 4096, 300, 20, 4e-3, 1e-6, 0.05, 0.3, None, 0.9999, 1, 84.4),
    "l2vit_base_384": (384, 1024, 30, 5, 4e-5, 4e-7, 1e-8, 0.2, None, 0.9999, 1, 87.0),
    "dinat_mini": (224, 1024, 310, 20, 1e-3, 5e-6, 0.05, 0.2, 5.0, None, 1, 81.8),
    "dinat_tiny": (224, 1024, 310, 20, 1e-3, 5e-6, 0.05, 0.2, 5.0, None, 1, 82.7),
    "dinat_small": (224, 1024, 310, 20, 1e-3, 5e-6, 0.05, 0.3, 5.0, None, 1, 83.8),
    "dinat_base": (224, 1024, 310, 20, 1e-3, 5e-6, 0.05, 0.5, 5.0, None, 1, 84.4),
    "dinat_large": (224, 512, 30, 0, 5e-5, 0.0, 1e-4, 0.35, 5.0, None, 1, 86.6),
    "dinat_large_384": (384, 512, 30, 0, 5e-5, 0.0, 1e-10, 0.35, 5.0, None, 1, 87.4),
    "dinat_s_tiny": (224, 1024, 310, 20, 1e-3, 5e-6, 0.05, 0.2, 5.0, None, 1, 81.8),
    "dinat_s_small": (224, 1024, 310, 20, 1e-3, 5e-6, 0.05, 0.3, 5.0, None, 1, 83.5),
    "dinat_s_base": (224, 1024, 310, 20, 1e-3, 5e-6, 0.05, 0.5, 5.0, None, 1, 83.8),
    "dinat_s_large": (224, 512, 30, 0, 5e-5, 0.0, 1e-4, 0.35, 5.0, None, 1, 86.5),
    "dinat_s_large_384": (384, 512, 30, 0, 5e-5, 0.0, 1e-5, 0.35, 5.0, None, 1, 87.4),
    "flowformer_cv": (224, 768, 310, 5, 7.5e-4, 1e-5, 0.05, 0.2, 1.0, None, 1, 80.6),
    "litv2_small": (224, 1024, 300, 20, 1e-3, 1e-5, 0.05, 0.2, 5.0, None, 1, 82.0),
    "litv2_medium": (224, 1024, 300, 20, 1e-3, 1e-5, 0.05, 0.3, 5.0, None, 1, 83.3),
    "litv2_base": (224, 1024, 300, 20, 1e-3, 1e-5, 0.05, 0.5, 5.0, None, 1, 83.6),
    "litv2_base_384": (384, 1024, 30, 5, 4e-5, 4e-7, 1e-8, 0.5, 5.0, None, 1, 84.7),
    "moh_vit_s_80": (224, 1024, 300, 5, 1e-3, 1e-5, 0.05, 0.45, 1.0, None, 3, 84.7),
    "moh_vit_s_75": (224, 1024, 300, 5, 1e-3, 1e-5, 0.05, 0.45, 1.0, None, 3, 84.6),
    "moh_vit_b_75": (224, 1024, 300, 5, 1e-3, 1e-5, 0.05, 0.6, 1.0, None, 3, 84.9),
    "moh_vit_b_50": (224, 1024, 300, 5, 1e-3, 1e-5, 0.05, 0.6, 1.0, None, 3, 84.7),
    "nat_mini": (224, 1024, 310, 20, 1e-3, 5e-6, 0.05, 0.2, 5.0, None, 1, 81.8),
    "nat_tiny": (224, 1024, 310, 20, 1e-3, 5e-6, 0.05, 0.2, 5.0, None, 1, 83.2),
    "nat_small": (224, 1024, 310, 20, 1e-3, 5e-6, 0.05, 0.3, 5.0, None, 1, 83.7),
    "nat_base": (224, 1024, 310, 20, 1e-3, 5e-6, 0.05, 0.5, 5.0, None, 1, 84.3),
    "s2aformer_mini": (224, 1024, 300, 5, 1e-3, 1e-5, 0.025, 0.0, None, None, 1, 75.1),
    "s2aformer_tiny": (224, 1024, 300, 20, 1e-3, 1e-5, 0.025, 0.0, None, None, 1, 77.7),
    "s2aformer_xsmall": (224, 1024, 300, 20, 1e-3, 1e-5, 0.025, 0.02, None, None, 1, 78.9),
    "s2aformer_small": (224, 1024, 300, 20, 1e-3, 1e-5, 0.05, 0.05, None, None, 1, 80.8),
    "s2aformer_medium": (224, 1024, 300, 20, 1e-3, 1e-5, 0.05, 0.15, None, None, 1, 82.3),
    "spectformer_s": (224, 1024, 310, 5, 1e-3, 1e-5, 0.05, 0.1, None, None, 1, 84.3),
    "spectformer_b": (224, 1024, 310, 5, 1e-3, 1e-5, 0.05, 0.1, None, None, 1, 85.0),
    "spectformer_l": (224, 1024, 310, 5, 1e-3, 1e-5, 0.05, 0.3, 1.0, None, 1, 85.7),
    "spectformer_vanilla_ti": (224, 1024, 320, 5, 1e-3, 1e-5, 0.05, 0.0, 1.0, None, 1, 76.9),
    "spectformer_vanilla_xs": (224, 1024, 320, 5, 1e-3, 1e-5, 0.05, 0.0, 1.0, None, 1, 80.2),
    "spectformer_vanilla_s": (224, 1024, 320, 5, 1e-3, 1e-5, 0.05, 0.15, 1.0, None, 1, 81.7),
    "spectformer_vanilla_b": (224, 1024, 320, 5, 1e-3, 1e-5, 0.05, 0.25, 1.0, None, 1, 82.1),
    "tessel_davit_tiny": (224, 1024, 310, 5, 1e-3, 1e-5, 0.05, 0.1, 1.0, None, 1, 82.8),
    "tessel_davit_small": (224, 1024, 310, 5, 1e-3, 1e-5, 0.05, 0.2, 1.0, None, 1, 84.2),
    "tessel_davit_base": (224, 1024, 310, 5, 1e-3, 1e-5, 0.05, 0.4, 1.0, None, 1, 84.6),
    "tessel_halonet26t": (256, 2048, 600, 5, 5e-3, 1e-6, 0.01, 0.1, None, None, 3, 79.1),
    "tessel_halonet50ts": (256, 2048, 600, 5, 5e-3, 1e-6, 0.01, 0.1, None, None, 3, 81.6),
    "tessel_sehalonet33ts": (256, 1024, 450, 3, 0.064, None, 1e-5, 0.2, None, 0.9999, 1, 81.0),
    "tessel_halonet_h0": (256, 1024, 300, 20, 1e-3, 1e-5, 0.05, 0.0, 1.0, None, 1, 77.9),
    "tessel_halonet_h1": (256, 1024, 300, 20, 1e-3, 1e-5, 0.05, 0.05, 1.0, None, 1, 79.9),
    "tessel_halonet_h2": (256, 1024, 300, 20, 1e-3, 1e-5, 0.05, 0.05, 1.0, None, 1, 80.4),
    "tessel_halonet_h3": (320, 1024, 300, 20, 1e-3, 1e-5, 0.05, 0.1, 1.0, None, 1, 81.9),
    "tessel_halonet_h4": (384, 1024, 300, 20, 1e-3, 1e-5, 0.05, 0.1, 1.0, None, 1, 83.3),
    "tessel_halonet_h5": (448, 1024, 300, 20, 1e-3, 1e-5, 0.05, 0.2, 1.0, None, 1, 84.0),
    "tessel_halonet_h6": (512, 1024, 300, 20, 1e-3, 1e-5, 0.05, 0.3, 1.0, None, 1, 84.4),
    "tessel_halonet_h7": (600, 1024, 300, 20, 1e-3, 1e-5, 0.05, 0.4, 1.0, None, 1, 84.9),
    "transnext_micro": (224, 1024, 300, 5, 1e-3, 1e-5, 0.05, 0.15, 1.0, None, 3, 82.5),
    "transnext_tiny": (224, 1024, 300, 5, 1e-3, 1e-5, 0.05, 0.25, 1.0, None, 3, 84.0),
    "transnext_small": (224, 1024, 300, 5, 1e-3, 1e-5, 0.05, 0.45, 1.0, None, 3, 84.7),
    "transnext_base": (224, 1024, 300, 5, 1e-3, 1e-5, 0.05, 0.6, 1.0, None, 3, 84.8),
    "transnext_small_384": (384, 1024, 5, 0, 1e-5, 1e-5, 0.05, 0.7, 1.0, None, 3, 86.0),
    "transnext_base_384": (384, 1024, 5, 0, 1e-5, 1e-5, 0.05, 0.8, 1.0, None, 3, 86.2),
    "transnext_micro_aaaa_256": (256, 1024, 300, 5, 1e-3, 1e-5, 0.05, 0.15, 1.0, None, 3, 82.6),
    "uniformer_small": (224, 1024, 310, 5, 1e-3, 1e-5, 0.05, 0.1, None, None, 3, 82.9),
    "uniformer_small_plus": (224, 1024, 310, 5, 1e-3, 1e-5, 0.05, 0.1, None, None, 3, 83.4),
    "uniformer_small_plus_dim64": (224, 1024, 310, 5, 1e-3, 1e-5, 0.05, 0.1, None, None, 3, 83.4),
    "uniformer_base": (224, 1024, 310, 5, 8e-4, 1e-5, 0.05, 0.3, None, None, 3, 83.8),
    "uniformer_base_ls": (224, 1024, 310, 5, 8e-4, 1e-5, 0.05, 0.3, None, None, 3, 83.9),
    "uniformer_large_ls": (224, 1024, 300, 5, 1.2e-3, 1e-5, 0.05, 0.4, None, 0.99992, 1, 85.6),
    "uniformer_small_tl": (224, 1024, 300, 5, 1.6e-3, 1e-5, 0.05, 0.1, None, 0.99992, 1, 83.4),
    "uniformer_small_dim64_tl": (224, 1024, 300, 5, 1.6e-3, 1e-5, 0.05, 0.1, None, 0.99992, 1, 83.4),
    "uniformer_small_plus_tl": (224, 1024, 300, 5, 1.6e-3, 1e-5, 0.05, 0.1, None, 0.99992, 1, 83.9),
    "uniformer_small_plus_dim64_tl": (224, 1024, 300, 5, 1.6e-3, 1e-5, 0.05, 0.1, None, 0.99992, 1, 83.6),
    "uniformer_base_tl": (224, 1024, 300, 5, 1.6e-3, 1e-5, 0.05, 0.3, None, 0.99992, 1, 85.1),
    "uniformer_base_dim64_tl": (224, 1024, 300, 5, 1.6e-3, 1e-5, 0.05, 0.3, None, 0.99992, 1, 84.8),
    "uniformer_xxsmall": (224, 4096, 610, 30, 3.2e-3, 1e-5, 0.1, 0.0, None, 0.9999, 1, 80.6),
    "uniformer_xsmall": (224, 4096, 610, 30, 4e-3, 1e-5, 0.05, 0.1, None, 0.9999, 1, 82.0),
    "van_b0": (224, 1024, 310, 5, 1e-3, 1e-6, 0.05, 0.1, None, None, 1, 75.4),
    "van_b1": (224, 1024, 310, 5, 1e-3, 1e-6, 0.05, 0.1, None, None, 1, 81.1),
    "van_b2": (224, 1024, 310, 5, 1e-3, 1e-6, 0.05, 0.1, None, None, 1, 82.8),
    "van_b3": (224, 1024, 310, 5, 1e-3, 1e-6, 0.05, 0.2, None, None, 1, 83.9),
    "van_b4": (224, 1024, 310, 5, 1e-3, 1e-6, 0.05, 0.2, None, None, 1, 84.2),
    "van_b5": (224, 1024, 310, 5, 1e-3, 1e-6, 0.05, 0.3, None, None, 1, None),
    "van_b6": (224, 1024, 310, 5, 1e-3, 1e-6, 0.05, 0.4, None, None, 1, None),
}
FINE_TUNES = {
    "agent_cswin_base_384": "local-dir:runs/agent_cswin_base/export",
    "agent_swin_base_384": "local-dir:runs/agent_swin_base/export",
    "inline_cswin_base_384": "local-dir:runs/inline_cswin_base/export",
    "inline_swin_base_384": "local-dir:runs/inline_swin_base/export",
    "cswin_base_384": "cswin_base.in1k",
    "cswin_large": "cswin_large.in22k",
    "cswin_large_384": "cswin_large.in22k",
    "l2vit_base_384": "l2vit_base.in22k",
    "dinat_large": "dinat_large.in22k",
    "dinat_large_384": "dinat_large.in22k",
    "dinat_s_large": "dinat_s_large.in22k",
    "dinat_s_large_384": "dinat_s_large.in22k",
    "litv2_base_384": "litv2_base.in1k",
    "transnext_base_384": "transnext_base.in1k",
    "transnext_small_384": "transnext_small.in1k",
}
# for the slow suite: of each family the first variant with a recipe; variants are listed from small to large
SMALLEST = {next((name for name in f.variants if name in RECIPES), None) for f in tessel.zoo.list_families()} - {None}


@cache
def loaded(name):
    return load_recipe(f"imagenet/{name}")


@cache
def meta_model(name):
    with torch.device("meta"):
        return timm.create_model(name)


def head(name):
    lines = (PACKAGED / "imagenet" / f"{name}.yaml").read_text().splitlines()
    return "\n".join(line for line in lines if line.startswith("#"))


def test_every_published_row_has_its_recipe():
    published = {w.model for w in load_manifest().values() if w.published_top1}
    assert published <= set(RECIPES) >= set(FACTS)
    assert {name for name in RECIPES if loaded(name).model.init_from} >= set(FINE_TUNES)


@pytest.mark.parametrize("name", FACTS)
def test_recipe_holds_the_published_figures(name):
    recipe, (size, batch, epochs, warmup, lr, last, decay, drop_path, clip, ema, repeats, top1) = (
        loaded(name),
        FACTS[name],
    )
    planned = plan(recipe, samples=IMAGENET, world_size=8)
    assert recipe.model.name == recipe.run.name == name and recipe.model.init_from == FINE_TUNES.get(name)
    assert (recipe.data.size, recipe.data.batch, recipe.sched.epochs) == (size, batch, epochs)
    assert planned.warmup == pytest.approx(warmup * IMAGENET / batch, abs=1) and planned.lr == pytest.approx(lr)
    assert recipe.optim.weight_decay == decay and recipe.optim.clip == clip and recipe.model.drop_path_rate == drop_path
    assert recipe.ema.decay == ema and recipe.data.aug.repeated_aug == repeats
    assert last is None or last in (recipe.sched.min_lr, lr)
    accuracy = "accuracy in the paper is not known to us" if top1 is None else f"top-1 {top1:.1f} % (published"
    assert accuracy in head(name)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_follows_the_authors_code_in_erasing_and_batch_norm(name):
    assert loaded(name).data.aug.erase_after_mixing == name.startswith(("cswin", "dinat", "nat", "tessel_davit"))
    unsynchronized = ("attnet", "biformer", "l2vit", "litv2", "spectformer", "uniformer", "van")
    assert loaded(name).parallel.sync_batch_norm != name.startswith(unsynchronized)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_agrees_with_the_manifest(name):
    rows = [row for row in load_manifest().values() if row.model == name and row.published_top1 and not row.options]
    # the first row is the default; others may be of other image sizes
    assert all(loaded(name).data.size == row.input_size[-1] for row in rows[:1])
    # one file may have two rows, with the accuracy of the paper and with timm's of its own evaluation
    assert not rows or any(f"top-1 {row.published_top1:.1f} %" in head(name) for row in rows)
    assert re.search(r"arXiv \d{4}\.\d{5}", head(name)) and "\n# source: " in head(name)
    paper = FAMILIES[name].pretrained_cfg["paper_ids"]
    assert paper.replace("arXiv:", "arXiv ") in head(name)


@pytest.mark.parametrize("name", RECIPES)
def test_optimizer_groups_of_the_full_model(name):
    recipe, model = loaded(name), meta_model(name)
    lr = plan(recipe, samples=IMAGENET, world_size=8).lr
    optimizer = build_optimizer(model, recipe.optim, lr)
    groups = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(groups) == len(list(model.parameters()))
    undecayed = model.no_weight_decay()
    for key, parameter in model.named_parameters():
        exempt = parameter.ndim <= 1 or key.endswith(".bias") or key in undecayed
        wanted = 0 if exempt and not recipe.optim.decay_norms else recipe.optim.weight_decay
        assert groups[parameter]["weight_decay"] == wanted, key
        slow = {"litv2": (".offset.weight", 0.01), "cswin_large": ("", 0.05)}
        ending, factor = next((rule for prefix, rule in slow.items() if name.startswith(prefix)), ("none", 1))
        slowed = key.endswith(ending) and not key.startswith("head.fc.")
        assert groups[parameter]["lr"] == pytest.approx(lr * factor if slowed else lr), key


def test_transnext_exempts_the_published_parameters_from_weight_decay():
    model = meta_model("transnext_tiny")
    undecayed, named = model.no_weight_decay(), dict(model.named_parameters())
    assert all(named[key].ndim > 1 for key in undecayed)
    for part in ("temperature", "query_embedding", "relative_pos_bias_local"):
        assert any(key.endswith(part) for key in undecayed)
    for part in ("learnable_tokens", "learnable_bias"):
        assert any(key.endswith(part) for key in named) and not any(key.endswith(part) for key in undecayed)


@pytest.mark.parametrize("name", FACTS)
def test_learning_rate_at_named_points(name):
    recipe, (*_, last, _, _, _, _, _, _) = loaded(name), FACTS[name]
    planned = plan(recipe, samples=IMAGENET, world_size=8)
    lr = trainer.learning_rate(recipe, planned)

    def cosine(step):
        return end + (planned.lr - end) * (1 + math.cos(math.pi * step / (planned.steps - planned.cooldown))) / 2

    start, end, warmup = recipe.sched.warmup_lr, recipe.sched.min_lr, planned.warmup
    if recipe.sched.name == "constant":
        assert {lr(0), lr(planned.steps // 2), lr(planned.steps - 1)} == {planned.lr}
        return
    if warmup:
        assert lr(0) == pytest.approx(start)
        assert lr(warmup // 2) == pytest.approx(start + (planned.lr - start) * (warmup // 2) / warmup)
    if recipe.sched.name == "step":
        assert lr(warmup) == pytest.approx(planned.lr * 0.97 ** (warmup // 3003))
        assert lr(planned.steps - 1) == pytest.approx(planned.lr * 0.97 ** ((planned.steps - 1) // 3003))
        return
    if recipe.sched.name == "poly":
        assert [lr(planned.steps * i // 4) / planned.lr for i in range(4)] == pytest.approx(
            [1, 0.75, 0.5, 0.25], abs=1e-4
        )
        return
    assert lr(warmup) == pytest.approx(cosine(warmup)) and lr(warmup) > 0.93 * planned.lr
    assert lr(planned.steps // 2) == pytest.approx(cosine(planned.steps // 2))
    assert lr(planned.steps - 1) == pytest.approx(last, rel=1e-3)
    released = name.startswith("uniformer") and loaded(name).sched.epochs > 300
    hosts = ("agent_pvt", "agent_cswin", "inline_pvt", "inline_cswin")
    cooled = name.startswith(("cswin", "dinat", "flowformer", "nat", "tessel_davit", "van", *hosts)) or released
    assert planned.cooldown == (round(10 * IMAGENET / recipe.data.batch) if cooled else 0)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return trainer.draw_folder(tmp_path_factory.mktemp("images"), train=4, val=1)


def two_steps(name, images, tmp_path, model):
    """Two updates of 4 images at 64 px."""
    here = [f"data.root={images}", "data.size=64", "data.batch=4", "data.micro_batch=null", "data.workers=0"]
    short = ["sched.epochs=null", "sched.steps=2", "sched.warmup=0", "sched.cooldown=0", "parallel.precision=fp32"]
    where = [f"run.out={tmp_path}", "run.device=cpu", f"model.name={model}", "model.init_from=null"]
    recipe = load_recipe(f"imagenet/{name}", [*here, *short, *where])
    engine, moved = trainer.run_updates(recipe, 2)
    assert moved and (engine.average is None) == (recipe.ema.decay is None)


@pytest.mark.parametrize("name", RECIPES)
def test_two_steps_with_the_familys_smallest_model(name, images, tmp_path):
    atto = next(variant for variant in FAMILIES[name].variants if variant.endswith("_atto"))
    two_steps(name, images, tmp_path, atto)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(SMALLEST))
def test_two_steps_with_the_model_itself(name, images, tmp_path):
    two_steps(name, images, tmp_path, name)


def test_recipes_page_of_the_docs_is_current():
    done = subprocess.run([sys.executable, PAGE_SCRIPT, "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
