"""Training of the student from stored teacher scores."""
