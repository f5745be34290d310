"""Rows that the expert exchange sends over each link, counted from where tokens are routed."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int


@dataclass(frozen=True)
class RowsSent:
    """Rows that each device of an expert-parallel group sends to others in a dispatch; a combine takes them back."""

    node: Int[np.ndarray, "nodes gpus"]
    """To devices of other nodes, over the slow link."""
    gpu: Int[np.ndarray, "nodes gpus"]
    """To devices of its own node, over the fast link."""


def rows_sent_per_expert(experts: Int[np.ndarray, "nodes gpus tokens top_k"], num_experts: int) -> RowsSent:
    """One row for each expert of a token, straight to its device: what deduplication is measured against.

    Args:
        experts: the choices of the tokens of each device.
        num_experts: spread evenly over the devices, in the order of nodes and of the GPUs in them.
    """
    nodes, gpus = experts.shape[:2]
    node, gpu = _places(experts, num_experts)
    own_node = node == np.arange(nodes)[:, None, None, None]
    own_gpu = gpu == np.arange(gpus)[:, None, None]
    return RowsSent(node=_per_device(~own_node), gpu=_per_device(own_node & ~own_gpu))


def rows_sent_flat(experts: Int[np.ndarray, "nodes gpus tokens top_k"], num_experts: int) -> RowsSent:
    """One row for each other device that holds any of a token's experts, straight to it.

    Arguments are those of `rows_sent_per_expert`.
    """
    nodes, gpus = experts.shape[:2]
    reached = _reached(experts, num_experts)
    itself = np.eye(nodes * gpus, dtype=bool).reshape(nodes, gpus, 1, nodes, gpus)
    own_node = np.eye(nodes, dtype=bool)[:, None, None, :, None]
    count = lambda to: to.sum(axis=(2, 3, 4))  # noqa: E731
    return RowsSent(node=count(reached & ~own_node), gpu=count(reached & own_node & ~itself))


def rows_sent_hierarchical(experts: Int[np.ndarray, "nodes gpus tokens top_k"], num_experts: int) -> RowsSent:
    """One row for each other node that holds any of a token's experts, to the device of the same index there; from
    this, or from the token's own device in its own node, one for each other device there that holds any (report 3.2.2).

    Arguments are those of `rows_sent_per_expert`.
    """
    nodes, gpus = experts.shape[:2]
    reached = _reached(experts, num_experts)
    to_nodes = reached.any(axis=-1) & ~np.eye(nodes, dtype=bool)[:, None, None, :]
    to_devices = reached & ~np.eye(gpus, dtype=bool)[:, None, None, :]
    return RowsSent(node=_per_device(to_nodes), gpu=to_devices.sum(axis=(0, 2, 4)).T)


def _reached(experts: np.ndarray, num_experts: int) -> Bool[np.ndarray, "nodes gpus tokens to_nodes to_gpus"]:
    """Whether any of a token's experts lives on a device."""
    nodes, gpus, tokens, _ = experts.shape
    node, gpu = _places(experts, num_experts)
    reached = np.zeros((nodes, gpus, tokens, nodes * gpus), bool)
    np.put_along_axis(reached, node * gpus + gpu, True, axis=-1)
    return reached.reshape(nodes, gpus, tokens, nodes, gpus)


def _places(experts: np.ndarray, num_experts: int) -> tuple[np.ndarray, np.ndarray]:
    """The node of each expert, and the GPU in it."""
    nodes, gpus = experts.shape[:2]
    return np.divmod(experts // (num_experts // (nodes * gpus)), gpus)


def _per_device(sent: Bool[np.ndarray, "nodes gpus tokens targets"]) -> Int[np.ndarray, "nodes gpus"]:
    return sent.sum(axis=(2, 3))
