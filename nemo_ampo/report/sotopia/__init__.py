"""The pages of SOTOPIA runs: one, two side by side, many."""
