"""Stores that remember which messages were handled."""
