"""Pictures: panels, the words on them, and the files that they become.

What may change here: how any picture looks. What is drawn belongs to the rooms.
"""
