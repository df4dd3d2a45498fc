"""What is in a chat data set: numbers, warnings, and the first samples token by token."""
