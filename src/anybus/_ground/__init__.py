"""The base of all other packages: errors, checks of values, cancellation, the clock, the event loop, the log."""
