"""The rule language and what is made of it: options, source code, the shipped texts. Torch-free."""
