"""A recipe's graph for looking at: every operator, where it runs and what it reads.

Needs no GPU, for a GPU's graph too: DALI builds and serialises it, and only running takes one.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from headrace.pipelines.engines.dali.graph import build_pipeline
from headrace.pipelines.engines.dali.nodes import Placement
from headrace.pipelines.recipe import Augmentation


@dataclass(frozen=True)
class Node:
    """One operator of a graph.

    operator: DALI's name, such as `fn.resize` or `math.mul`. placement: cpu, gpu or mixed.
    inputs: (name of the node, where its result is read). draws_random_numbers: as DALI says.
    """

    name: str
    operator: str
    placement: str
    inputs: tuple[tuple[str, str], ...]
    arguments: tuple[tuple[str, str], ...]
    draws_random_numbers: bool


def draws_random_numbers(schema: Any) -> bool:
    """Whether an operator with this DALI schema has a generator of its own."""
    return schema.HasRandomSeedArg() or schema.HasRandomStateArg()


@dataclass(frozen=True)
class Graph:
    """nodes: inputs before what reads them. outputs: (name of the node, where it is handed out)."""

    nodes: tuple[Node, ...]
    outputs: tuple[tuple[str, str], ...]

    def copies(self) -> dict[str, str]:
        """Names and operators of the nodes on the host whose results are copied to the GPU.

        A mixed operator, the decoder, takes what it needs from the host itself.
        """
        on_host = {node.name: node.operator for node in self.nodes if node.placement == "cpu"}
        read = [edge for node in self.nodes if node.placement == "gpu" for edge in node.inputs]
        return {
            name: on_host[name]
            for name, place in (*read, *self.outputs)
            if place == "gpu" and name in on_host
        }

    def counts(self) -> dict[str, int]:
        """Nodes by kind: `inputs`, files and numbers that are fed; `decoding`; `host`, what
        arranges arguments there; `gpu`, kernels or a few each; `all`. And `copies`."""
        kinds = Counter(
            "inputs" if node.operator == "fn.external_source" else node.placement
            for node in self.nodes
        )
        return {
            "inputs": kinds["inputs"],
            "decoding": kinds["mixed"],
            "host": kinds["cpu"],
            "gpu": kinds["gpu"],
            "all": len(self.nodes),
            "copies": len(self.copies()),
        }


def graph_of(
    augmentation: Augmentation, placement: Placement, finished: torch.dtype | None = None
) -> Graph:
    """The recipe's graph as `build_pipeline` makes it. finished: as there."""
    pipeline = build_pipeline(augmentation, placement, finished=finished)
    pipeline._build_graph()
    nodes: list[Node] = []
    for instance in pipeline._ops or ():
        arguments = dict(instance._op._init_args)
        module = arguments.pop("_module").removeprefix("nvidia.dali.")
        nodes.append(
            Node(
                name=instance.name,
                operator=f"{module}.{arguments.pop('_display_name')}",
                placement=instance._op.device,
                inputs=tuple((edge.name, edge.device) for edge in instance.inputs),
                arguments=tuple((name, str(value)) for name, value in sorted(arguments.items())),
                draws_random_numbers=draws_random_numbers(instance._op.schema),
            )
        )
    outputs = tuple((edge.name, edge.device) for edge in pipeline._graph_outputs or ())
    return Graph(tuple(nodes), outputs)
