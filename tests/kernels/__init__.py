"""Kernels' sources executed on the CPU, and compared with their twins."""
