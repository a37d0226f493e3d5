"""Ranks: mesh, collectives, vocabulary shards."""
