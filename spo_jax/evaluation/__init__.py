"""How good pictures are, and how good a scorer is: metrics, accuracy on pairs, and their statistics."""
