"""What the kernels cost: compiled, counted in bytes, and timed where there is a GPU."""
