"""One file per provider; ``registry.BACKENDS`` lists them in order of preference."""
