"""hansfree: train and audit classifiers that are right for the right reasons."""
