"""Training of a step-aware preference model (SPO, section 3.2)."""
