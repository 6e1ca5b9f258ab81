"""What share of the training tokens each domain gets."""
