"""What people would prefer by HPS v2.1: compositional captions (arXiv:2306.09341)."""

from d3po_bench.types import Objective

OBJECTIVE = Objective(prompts="captions", scorer="hps_v2_1", sign=1)
