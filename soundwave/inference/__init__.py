"""Using a trained model: `answer` reads and asks it, `long` cuts recordings of any length and transcribes them."""
