"""Linen shells: they declare parameters and call `jaxfw.ops`. The only folder that imports flax.linen."""
