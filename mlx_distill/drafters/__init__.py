"""Small networks that predict what a target will write."""
