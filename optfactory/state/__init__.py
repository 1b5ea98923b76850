"""One parameter's state: its tensors, quantization maps, and codecs."""
