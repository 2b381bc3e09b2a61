"""Pure mathematics on arrays: shape-typed functions without parameters, state or flax."""
