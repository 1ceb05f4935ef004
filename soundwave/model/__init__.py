"""The model: its configuration, the network, its processor, and the augmentation of features while training."""
