"""A run while it runs: its records and their copies, signals, deadlines, and ranks that look after each other."""
