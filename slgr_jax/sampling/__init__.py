"""Arrays on the device and what is drawn from them there."""
