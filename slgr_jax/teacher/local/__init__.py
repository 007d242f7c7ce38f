"""Local models as teachers: scores and vectors of texts."""
