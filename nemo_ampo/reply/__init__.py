"""A reply of the policy: its four thinking modes and the grammar that each is written in."""
