"""What a step runs on: how fast a device computes, and how fast bytes travel inside a node and between nodes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    """Nodes of equal devices. Bandwidths are those of one device in one direction."""

    node: int = 8  # devices
    inside: float = 0.0  # bytes/s between the devices of a node; 0: not known
    between: float = 0.0  # bytes/s of a device to other nodes
    latency_inside: float = 5e-6  # seconds of one message; assumed, not from a data sheet
    latency_between: float = 15e-6
    peak: float = 0.0  # FLOP/s of dense bf16 products
    reached: float = 0.0  # FLOP/s that the step's products are taken to reach; 0: the peak
    memory: float = 0.0  # bytes


# Eight GPUs a node, each with a ConnectX-7 of 400 Gb/s: NVIDIA DGX BasePOD reference architecture, "Core Components"
# (opened). 80 GB, 989.4 TFLOP/s of dense bf16 and NVLink's 900 GB/s, 450 each way: NVIDIA's data sheet as quoted by
# glennklockwood.com/garden/processors/h100; the data sheet itself could not be opened. Latencies are assumed.
MACHINES = {"h100": Machine(inside=450e9, between=50e9, peak=989.4e12, memory=80e9)}
