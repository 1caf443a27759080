"""GPU memory: live bytes of a real step, and the same predicted from a configuration alone."""
