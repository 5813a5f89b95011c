"""Tool calls: the texts that models write them as, read while they come."""
