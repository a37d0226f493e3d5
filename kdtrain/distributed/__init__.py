"""Mesh, collectives, vocabulary shards, point-to-point channel."""
