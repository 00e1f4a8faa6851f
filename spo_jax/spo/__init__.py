"""Step-aware preference optimization of a text-to-image model (SPO, section 3)."""
