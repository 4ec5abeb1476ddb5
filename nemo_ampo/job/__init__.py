"""A run as a job on a machine that may stop it: what it will need, may it start, when must it end, was it worth it."""
