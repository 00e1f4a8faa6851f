"""The optimization of adapters on preference pairs, and everything that records it."""
