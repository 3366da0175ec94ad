"""Losses, and which parameters they train."""
