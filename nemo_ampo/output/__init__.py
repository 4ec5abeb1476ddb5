"""What commands write: one writer at a time, whole or not at all, and honest about how far it got."""
