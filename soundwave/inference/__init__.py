"""Using a trained model: `answer` reads and asks it, `drafts` checks drafts, `long` cuts and transcribes recordings."""
