"""Tokens: stores, packing, order, loading."""
