"""Scores of pictures, and the pairs of better and worse candidates made from them."""
