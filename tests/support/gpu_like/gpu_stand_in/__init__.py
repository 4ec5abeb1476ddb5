"""A GPU node played on a CPU; see README.md in the folder above."""
