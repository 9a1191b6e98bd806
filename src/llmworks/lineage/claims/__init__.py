"""What the files of models from elsewhere state: parents and licenses."""
