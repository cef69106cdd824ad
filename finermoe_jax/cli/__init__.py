"""The commands: the only place that knows absl."""
