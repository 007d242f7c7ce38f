"""absl flags -> config -> one library call: the commands."""
