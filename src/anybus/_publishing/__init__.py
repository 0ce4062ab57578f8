"""Publishing: one message or many, with the options of a publish."""
