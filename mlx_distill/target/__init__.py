"""Any mlx-lm model as the verifier of trees."""
