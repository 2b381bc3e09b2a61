"""How a model remembers its context: the contract of a cache policy, and the policies."""

from jaxfw.models.cache.full import FullCache, FullState
from jaxfw.models.cache.policy import QKV, AttentionSpec, Cache, CachePolicy, Step
from jaxfw.models.cache.quantised import Int8Cache, Int8State
from jaxfw.models.cache.random import RandomCache, RandomState
from jaxfw.models.cache.ring import RingCache, RingState

__all__ = [
    "QKV", "AttentionSpec", "Cache", "CachePolicy", "FullCache", "FullState", "Int8Cache", "Int8State", "RandomCache",
    "RandomState", "RingCache", "RingState", "Step",
]  # fmt: skip
