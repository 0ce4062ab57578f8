"""A subscription at work: it takes, holds, handles and settles entries."""
