"""Where tensors live: ordinary memory, mapped files, CUDA managed and pinned memory."""
