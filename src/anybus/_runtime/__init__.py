"""A subscription at work: what it takes, holds, handles and settles."""
