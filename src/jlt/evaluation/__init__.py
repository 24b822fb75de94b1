"""Evaluation: features, their moments, distances, class agreement, and the record that states them."""
