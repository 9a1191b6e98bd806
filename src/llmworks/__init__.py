"""llmworks: one workshop for the whole life of a language model."""
