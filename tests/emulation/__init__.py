"""Runs CUDA kernels on CPUs, thread by thread, so that tests need no GPU."""
