"""Data made by models: one recipe of generation per file, over any engine; every row knows the prompts and the model
that made it.
"""
