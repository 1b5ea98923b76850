"""From source to a loaded library: the compiler, instruction sets, prebuilt kernels."""
