"""The config group `optimizer/`; importable as `optfactory.configs` once installed."""
