"""Compiles every CUDA kernel for several GPU generations, on machines without a GPU."""
