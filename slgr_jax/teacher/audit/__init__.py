"""Where a teacher is right, judged by interactions that it has not seen."""
