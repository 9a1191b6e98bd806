"""Text in any script."""
