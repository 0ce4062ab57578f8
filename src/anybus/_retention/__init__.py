"""Retention: the topics of a bus are trimmed as they were declared."""
