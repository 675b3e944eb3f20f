"""Matrix products on Linux: OpenBLAS in front of MLX's slow BLAS, and products of a few rows."""
