"""Drafting, trees, verification and the decoding loop."""
