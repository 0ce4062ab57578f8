"""What becomes of failures: backoff, policies, verdicts, the settlement table, copies for retries and dead letters."""
