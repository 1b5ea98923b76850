"""What the registry makes: the files of configs/, the JSON Schema, overrides. Torch-free."""
