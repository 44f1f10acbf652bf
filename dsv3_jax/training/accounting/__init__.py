"""What a configuration costs: parameters, memory, FLOPs and cache. Counted from shapes, nothing is allocated."""

from dsv3_jax.training.accounting.activations import activation_bytes, layer_activations, product_input_bytes
from dsv3_jax.training.accounting.flops import h800_hours, model_flops_per_token, published_utilisation, tokens_of_run, training_flops
from dsv3_jax.training.accounting.memory import cache_bytes_per_token, device_memory, ema_bytes, mha_bytes_per_token
from dsv3_jax.training.accounting.parameters import count_parameters, parameter_parts

__all__ = [
    "activation_bytes",
    "cache_bytes_per_token",
    "count_parameters",
    "device_memory",
    "ema_bytes",
    "h800_hours",
    "layer_activations",
    "mha_bytes_per_token",
    "model_flops_per_token",
    "parameter_parts",
    "product_input_bytes",
    "published_utilisation",
    "tokens_of_run",
    "training_flops",
]
