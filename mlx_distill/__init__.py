"""Faster generation for any mlx-lm model: draft with a small network, verify with the model."""

from mlx_distill.openblas import load_openblas

load_openblas()  # has to come before the first import of mlx.core
