"""From parameters and rules to param groups."""
