"""Speech data: manifests and audio files in, samples and batches out."""
