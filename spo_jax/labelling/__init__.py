"""Labelling given pairs by hand: what a session is, its log, the page and the server on this machine."""
