"""What drafting is worth on this machine, against mlx-lm alone."""
