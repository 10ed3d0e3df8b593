"""Material for tests, benchmarks and documentation; nothing in the library imports it."""
