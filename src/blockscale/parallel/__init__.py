"""Layers whose weight is spread over processes, on top of torch.distributed."""
