"""One generation method per file, over any engine. Every row records its prompts and generator model."""
