"""One step's work: what has a gradient, what changed since the last step, what it costs."""
