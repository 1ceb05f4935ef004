"""The three stages of training, on transformers' Trainer."""
