"""DTensors, and vocabularies over ranks."""
