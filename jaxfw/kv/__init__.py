"""KV-cache compression, measured on fundamental abilities (arXiv:2502.01941), with ShotKV.

    lm = jaxfw.load("embedded-1")
    lm.generate(prompt, kv="snapkv@keep=0.3")
    lm.generate(prompt, kv="shotkv@keep=0.3,rd=0.4", protocol="refeed")

`parse` turns a string into a cache policy of the core, `METHODS` lists the names; `docs/add_a_method.md` adds one.
"""

from jaxfw.kv.cache import KVCache
from jaxfw.kv.spec import METHODS, parse

__all__ = ["METHODS", "KVCache", "parse"]
