"""Make training data: check it, leave out what is transcribed wrongly, and build tasks from recordings."""
