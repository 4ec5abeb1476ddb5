"""Configuration: composed from YAML, typed, and checked before anything runs. A
section stands in its room's ``config.py``."""
