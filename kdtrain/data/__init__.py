"""Tokens: stores, packing, order, loading."""

from kdtrain.data.token_store import TokenStore

__all__ = ["TokenStore"]
