"""The commands. Only this folder imports absl."""
