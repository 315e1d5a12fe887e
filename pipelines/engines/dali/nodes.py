"""What the parts of DALI's graph are made with: inputs by name, constants, casts."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from nvidia.dali import fn, types
from nvidia.dali.data_node import DataNode
from nvidia.dali.types import DALIDataType

Placement = Literal["cpu", "gpu"]

UINT8, FLOAT = DALIDataType.UINT8, DALIDataType.FLOAT

# Pillow's blends cut off the fraction; DALI rounds to the nearest when it casts to 8 bits, halves
# away from zero on the CPU and to even on a GPU. Just under a half makes one the other, and a
# whole number stays itself either way.
TRUNCATE = 0.5 - 2.0**-10


@dataclass(frozen=True)
class Inputs:
    """What is fed to one graph, by the names of the columns, and where the graph's pictures are."""

    placement: Placement
    nodes: dict[str, DataNode]

    def argument(self, name: str) -> DataNode:
        """A column as an operator's argument, which DALI reads on the host."""
        return self.nodes[name]

    def operand(self, name: str) -> DataNode:
        """A column as an operand of arithmetic with pictures, hence where those are."""
        return self.nodes[name].gpu() if self.placement == "gpu" else self.nodes[name]

    def constant(self, values: list[Any], dtype: type[np.generic] = np.float32) -> DataNode:
        """A constant array where the pictures are."""
        return single_node(types.Constant(np.array(values, dtype), device=self.placement))

    def per_channel(self, red: float, green: float, blue: float) -> DataNode:
        """A constant float32 [1, 1, 1, 3], one number for each channel."""
        return self.constant([[[[red, green, blue]]]])


def single_node(node: Any) -> DataNode:
    """DALI's operators are typed as returning a node, several or none; ours return one."""
    if not isinstance(node, DataNode):
        raise TypeError(f"expected one DALI node, got {node!r}")
    return node


def cast(node: DataNode, dtype: DALIDataType) -> DataNode:
    """To 8 bits it clamps and rounds."""
    return single_node(fn.cast(node, dtype=dtype))


def level(value: int) -> Any:
    """A constant of 8 bits, so that arithmetic with pictures stays in 8 bits."""
    return types.Constant(value, dtype=UINT8)
