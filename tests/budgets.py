"""Seconds of one process that each room's default tests may take; two processes share them, so the suite takes half.

The end of a test run prints what each room took and marks those over their budget. It fails nothing: machines differ.
`test_house.py` sees that the sum, with the rooms that are to come, stays within the total.
"""

TOTAL = 2 * 9 * 60  # of the whole house, when all rooms are built
NEW_ROOM = 50  # of a room that has no tests of its own yet

BUDGETS = {
    "": 43,  # the files beside the folders: the command line, the labs
    "align": 40,
    "assets": 6,
    "core": 5,
    "data": 60,
    "embed": 5,
    "evaluate": 50,
    "generate": 60,
    "importers": 5,
    "lineage": 18,
    "merge": 20,
    "model": 25,
    "quantize": 60,
    "runtime": 30,
    "sandbox": 10,
    "score": 8,
    "serve": 10,
    "synthesize": 10,
    "tokenize": 35,
    "train": 100,
    "workflows": 30,
}
