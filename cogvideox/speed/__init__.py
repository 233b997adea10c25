"""What makes steps faster: always, without a change of the result, and by choice."""
