"""The message: its fields, headers, trace context, and payloads as JSON."""
