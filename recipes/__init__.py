"""Runnable stages. Each composes its YAML, checks it, builds the parts and calls one function of the library."""
