"""Files to the arrays the device needs."""
