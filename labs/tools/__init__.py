"""Read, check, execute and convert labs."""
