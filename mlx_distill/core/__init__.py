"""Pure array functions of drafting: sampling, trees, beams, verification."""
