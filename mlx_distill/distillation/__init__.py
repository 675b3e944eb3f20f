"""What small networks learn from big ones."""
