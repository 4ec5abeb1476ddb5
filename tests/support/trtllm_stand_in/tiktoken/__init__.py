"""NeMo's exporter imports it for tokenizers that are not used here; part of the NeMo container."""
