"""Sharded parameters: without processes, all shards of a tensor are updated in one."""
