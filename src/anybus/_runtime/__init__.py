"""The inside of a subscription. Nothing here is public."""
