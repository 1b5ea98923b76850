"""Native kernels on CPUs."""
