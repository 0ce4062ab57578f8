"""How failures are handled: backoff, policies, verdicts, the settlement table, copies for retries and dead letters."""
