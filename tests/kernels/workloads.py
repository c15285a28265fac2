"""The mixes that tests share with the tuner and the benchmarks."""

from ranklet.kernels.workloads import MIXES, Mix, assign

__all__ = ["MIXES", "Mix", "assign"]
