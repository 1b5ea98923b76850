"""Plain torch operations, on any device."""
