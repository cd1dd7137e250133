"""What one chip can do at most, by its vendor's own figures (dense bfloat16, no sparsity)."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peaks of one chip.

    Attributes:
      flops: bfloat16 operations per second.
      memory: Bytes of HBM. The vendors' gigabytes are read as 10^9 bytes; where they mean 2^30, the 7 % between the two
        are left to the runtime, which needs some.
      bandwidth: Bytes per second to and from HBM.
      interconnect: Bytes per second that it can send to its neighbours, over all links in one direction (half of the
        figure that is given for NVLink, which counts both).
    """

    flops: float
    memory: float
    bandwidth: float
    interconnect: float


# Google's pages of TPU versions; NVIDIA's data sheets of the SXM modules (A100 with 80 GB).
CHIPS: Mapping[str, Chip] = MappingProxyType(
    {
        "v5e": Chip(flops=197e12, memory=16e9, bandwidth=819e9, interconnect=200e9),
        "v5p": Chip(flops=459e12, memory=95e9, bandwidth=2765e9, interconnect=600e9),
        "v6e": Chip(flops=918e12, memory=32e9, bandwidth=1640e9, interconnect=448e9),
        "A100": Chip(flops=312e12, memory=80e9, bandwidth=2039e9, interconnect=300e9),
        "H100": Chip(flops=989e12, memory=80e9, bandwidth=3350e9, interconnect=450e9),
        "H200": Chip(flops=989e12, memory=141e9, bandwidth=4800e9, interconnect=450e9),
    }
)
