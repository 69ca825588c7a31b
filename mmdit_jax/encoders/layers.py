"""How the layers of a frozen text encoder are run: one after the other, each gathered by itself."""

from typing import Any

import flax.linen as nn

from mmdit_jax import sharding

BLOCKS = "blocks"
"""Name of the scanned blocks: their parameters have a leading axis of layers."""


def scan_layers(block: type[nn.Module], layers: int) -> Any:
    """A module that runs `layers` blocks in a loop; what follows the carry is the same for each.

    On a mesh every round gathers the parameters of its own block and of no other: unrolled, the
    compiler gathers those of all blocks before it needs them, and T5-XXL would have to fit on each
    device after all. The loop works in place on TPUs; XLA's CPU compiler makes a copy of a device's
    share in the layout of the gathered matrices.

    Args:
        block: a module, (carry, ...) -> (carry, None).
        layers: how many.
    """
    whole = nn.map_variables(block, "params", sharding.gather, init=True)
    return nn.scan(
        whole,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=nn.broadcast,
        length=layers,
    )
