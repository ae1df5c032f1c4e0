"""Teachers, students and the objectives between them."""
