"""Several texts in one call of a target: rows of keys, left-aligned, each as long as its text."""
