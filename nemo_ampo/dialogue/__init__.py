"""Dialogues between two characters: scenarios, who may know what, who speaks, and when it is over."""
