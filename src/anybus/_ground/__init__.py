"""What everything stands on: errors, checks of values, cancellation, the clock, the event loop, the log."""
