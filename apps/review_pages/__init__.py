"""Pages of the review app, and what they share."""
