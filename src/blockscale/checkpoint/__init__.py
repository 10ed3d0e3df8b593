"""Read, inspect, quantize and verify checkpoint files.

``header`` (one file's tensors) -> ``read`` (one checkpoint's tensors and config) -> ``schema``
(which tensors form a quantized layer; the only place that knows foreign names) -> ``requests``
(layers for the planner), ``inspect``, ``verify``, ``quantize``.
"""
