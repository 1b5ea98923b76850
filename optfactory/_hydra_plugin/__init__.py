"""Hydra plugin; the wheel also ships it as `hydra_plugins.optfactory`, where Hydra 1.3 looks."""
