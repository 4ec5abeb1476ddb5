"""The command line: ``nemo-ampo`` and what its commands do."""
