"""GPU kernels, each with a twin of plain MLX operations; callers ask for an operation."""
