"""The table of docs/backbones.md: python docs/make_backbones.py"""

from mmdit_jax import config as config_lib
from mmdit_jax.models import BACKBONES
from mmdit_jax.scaling import flops
from mmdit_jax.training import state

DEPTHS = (15, 24, 38)

print("| backbone | " + " | ".join(f"d={depth}" for depth in DEPTHS) + " |")
print("|---" * (len(DEPTHS) + 1) + "|")
for name in BACKBONES:
    cells = []
    for depth in DEPTHS:
        config = config_lib.default(depth=depth)
        config.model.backbone = name
        parameters = state.count_parameters(state.abstract_params(config))
        cells.append(f"{parameters:,}, {flops.forward_per_sample(config) / 1e12:.3f}")
    print(f"| {name} | " + " | ".join(cells) + " |")
