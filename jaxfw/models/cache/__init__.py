"""How a model remembers its context: the contract of a cache policy, and the policies."""

from jaxfw.models.cache.full import FullCache, FullState
from jaxfw.models.cache.policy import QKV, AttentionSpec, Cache, CachePolicy, Step

__all__ = ["QKV", "AttentionSpec", "Cache", "CachePolicy", "FullCache", "FullState", "Step"]
