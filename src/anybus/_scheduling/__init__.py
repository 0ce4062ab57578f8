"""Publishing at a time: delayed messages, and the view of those that wait."""
