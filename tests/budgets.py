"""Seconds of one process that each room's default tests may take; two processes share them, so the suite takes half.

The end of a test run prints what each room took and marks those over their budget. It fails nothing: machines differ.
"""

TOTAL = 2 * 9 * 60  # of the whole house, when all rooms are built
NEW_ROOM = 50  # what a room that is not yet in the list may take

BUDGETS: dict[str, int] = {}
